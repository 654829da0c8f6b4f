"""Codes come back: every code is that of some latent in every type of number, and a latent has one code in all of them.

For each row of the conformance suite there are latents that should have every code of its vocabulary, made by its
inverse, or a reason why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_vq.quantizers import FSQConfig, FSQuantizer, Quantizer
from stage1_vq.quantizers.bits import codes_to_bits
from tests.stage1_vq.tiny import DIM, QUANTIZER_ROWS, make_quantizer

LOW = (torch.bfloat16, torch.float16)


def every_code(k: int) -> Tensor:
    """1 1 k."""
    return torch.arange(k).view(1, 1, k)


def before_projection(quantizer: Any, narrow: Tensor) -> Tensor:
    """Latents that `project_in`, where there is one, makes these of: b n h w to b d h w."""
    if isinstance(layer := quantizer.project_in, nn.Identity):
        return narrow
    inverse = torch.linalg.pinv(layer.weight.flatten(1))  # d n
    return torch.einsum("dn,bnhw->bdhw", inverse, narrow - layer.bias.view(-1, 1, 1))


def of_vectors(quantizer: Any) -> Tensor:
    """The code vectors themselves, every code in all groups at once."""
    return quantizer.codes_to_latents(tuple(every_code(grid.vocabulary) for grid in quantizer.grids(1, 1)))


def of_looked_up_vectors(quantizer: Any) -> Tensor:
    return before_projection(quantizer, quantizer.entries.look_up(every_code(len(quantizer.codebook))))


def of_levels(quantizer: Any) -> Tensor:
    """The middle of each level, before tanh; the outermost ones lie beyond all numbers where tanh ends on them."""
    digits = every_code(math.prod(quantizer.config.levels)).unsqueeze(1) // quantizer.places % quantizer.levels
    offset = digits - quantizer.centre
    if not quantizer.config.preserve_symmetry:
        offset = offset + 0.5 * (quantizer.levels % 2 == 0)
    numbers = (offset / quantizer.half_range).clamp(-0.99, 0.99)
    if quantizer.config.bound == "tanh":
        numbers = torch.atanh(numbers) - quantizer.shift
    if quantizer.config.orthogonal_rotation:
        numbers = torch.einsum("bohw,io->bihw", numbers, quantizer.rotation)
    return before_projection(quantizer, numbers)


def of_parts(quantizer: Any) -> Tensor:
    """The middle of each part of the distribution."""
    digits = every_code(math.prod(quantizer.config.levels)).unsqueeze(1) // quantizer.places % quantizer.levels
    return before_projection(quantizer, quantizer.distribution.inverse((digits + 0.5) / quantizer.levels))


def of_bits(quantizer: Any) -> Tensor:
    """Each number clearly on its side."""
    bits = quantizer.config.bits
    sides = 2 * codes_to_bits(every_code(2**bits), bits).float() - 1
    if getattr(quantizer.config, "orthogonal_rotation", False):
        sides = torch.einsum("bohw,io->bihw", sides, quantizer.rotation)
    return before_projection(quantizer, sides)


def of_binary_grids(quantizer: Any) -> Tensor:
    """All bits of a place, whichever grids they belong to."""
    return 2 * codes_to_bits(every_code(2**quantizer.dim), quantizer.dim).float() - 1


def of_groups(quantizer: Any) -> Tensor:
    """Every code in all groups at once."""
    layers = quantizer.groups()
    inner = torch.cat([BY_KIND[layer.config.kind](layer) for layer in layers], 1)
    return before_projection(quantizer, inner)


BY_KIND: dict[str, Callable[[Any], Tensor]] = {
    "nearest": of_looked_up_vectors,
    "simvq": of_vectors,
    "fvq": of_vectors,
    "diveq": of_vectors,
    "fsq": of_levels,
    "fsp": of_parts,
    "lfq": of_bits,
    "bsq": of_bits,
    "binary_mapper": of_bits,
    "binary": of_binary_grids,
    "grouped": of_groups,
}
WITHOUT = {  # the start of a row: why there are no such latents
    "residual": "a sum of code vectors may be nearer to another vector of the first layer",
    "residual_scalar": "the finer grids overlap",
    "diveq, residual": "likewise",
    "grouped residual": "likewise",
    "hierarchical": "likewise, over scales",
    "qinco": "a sum of code vectors may be nearer to another vector of the first layer",
    "grouped multiscale": "likewise, over scales",
    "grouped lfq": "its projection makes fewer numbers than the groups' bits are",
    "grouped, shared codebook, projected": "likewise",
    "multiscale": "likewise, over scales",
    "gumbel": "codes go by logits of the latent, and vectors are others",
    "ibq": "the largest product with a code vector may be that of a longer one",
}
REACHED = [row for row in QUANTIZER_ROWS if not row.startswith(tuple(WITHOUT))]
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float32": nullcontext,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
}


def expected_codes(quantizer: Quantizer, count: int) -> list[Tensor]:
    grids = quantizer.grids(1, count)
    if len(grids) > 1 and quantizer.config_class.__name__ == "LFQConfig":
        below = [math.prod(grid.vocabulary for grid in grids[:number]) for number in range(len(grids))]
        return [every_code(count) // worth % grid.vocabulary for worth, grid in zip(below, grids, strict=True)]
    if len(grids) > 1 and quantizer.config_class.__name__ == "BinaryQuantizerConfig":
        whole, found = every_code(count), []
        for grid in reversed(grids):  # the last grid has the least significant bits
            found.insert(0, whole % grid.vocabulary)
            whole = whole // grid.vocabulary
        return found
    return [every_code(count) for _ in grids]


def test_every_row_is_reached_or_has_a_reason():
    assert {QUANTIZER_ROWS[row].kind for row in REACHED} == set(BY_KIND)
    assert all(any(row.startswith(start) for row in QUANTIZER_ROWS) for start in WITHOUT)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("row", REACHED)
def test_all_codes_are_reached_in_every_type_of_number(row, setting):
    quantizer = make_quantizer(row).eval()
    with torch.no_grad():
        z = BY_KIND[QUANTIZER_ROWS[row].kind](quantizer)
    expected = expected_codes(quantizer, z.shape[3])
    types = (torch.float32, *LOW)
    for dtype in types:
        with SETTINGS[setting](), torch.no_grad():
            found, again = quantizer.codes(z.to(dtype)), quantizer(z.to(dtype)).codes
        assert all(map(torch.equal, found, expected)), dtype
        assert all(map(torch.equal, again, expected)), dtype


@pytest.mark.parametrize("row", [row for row in REACHED if BY_KIND[QUANTIZER_ROWS[row].kind] is of_vectors])
def test_vectors_of_all_codes_have_these_codes(row):
    quantizer = make_quantizer(row).eval()
    codes = tuple(every_code(grid.vocabulary) for grid in quantizer.grids(1, 1))
    for _ in range(3):
        latents = quantizer.codes_to_latents(codes)
        assert all(map(torch.equal, quantizer.codes(latents), codes))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("row", QUANTIZER_ROWS)
def test_a_latent_has_the_same_codes_under_autocast_and_as_the_low_number_that_it_is(row, dtype):
    quantizer = make_quantizer(row).eval()
    z = torch.randn(20, DIM, 4, 5, generator=torch.Generator().manual_seed(1))
    low = z.to(dtype)
    expected, of_low = quantizer.codes(z), quantizer.codes(low.float())
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert all(map(torch.equal, quantizer.codes(z), expected))
        assert all(map(torch.equal, quantizer(z).codes, expected))
        assert all(map(torch.equal, quantizer.codes(low), of_low))
        vectors = quantizer.codes_to_latents(expected)
    assert all(map(torch.equal, quantizer.codes(low), of_low))
    assert torch.equal(vectors, quantizer.codes_to_latents(expected)), "and codes the same vectors"
    assert vectors.dtype == torch.float32


def test_bfloat16_arithmetic_would_lose_half_of_the_codes_of_fsq():
    """What a quantizer in bfloat16 does: the sum of digits times their places has 8 bits, of 1,000 codes."""
    levels = (8, 5, 5, 5)
    quantizer = FSQuantizer(FSQConfig(levels=levels)).eval()
    z = of_levels(quantizer)
    digits = quantizer.digits(quantizer.bounded(z))
    careless = (digits.bfloat16() * quantizer.places.bfloat16()).sum(1).long()
    assert len(careless.unique()) == 507
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer.codes(z.bfloat16())[0]
    assert torch.equal(found, every_code(1000))
    assert len(rearrange(quantizer.codes_to_latents((found,)), "1 d 1 n -> n d").unique(dim=0)) == 1000
