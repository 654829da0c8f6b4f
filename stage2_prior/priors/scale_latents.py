"""What a next-scale prior sees of the scales before: the latents that the decoder would get from them (Tian et al.
2024, arXiv:2404.02905, section 3.2).

They are sums of code vectors, which the autoencoder has learned. Stage two knows nothing of autoencoders, so the
tensors that this takes lie beside the codes: see `latents.safetensors` in docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.errors import UserError

AT_ONCE = 2**24  # distances
LEARNED_WIDTH = 32  # d of code vectors that the prior learns: as many numbers as those of VAR's tokenizer have


class ScaleLatents(nn.Module):
    """With sum 0 = 0, and from scale 1 to the last but one of S:

        sum s = sum s-1 + phi s (bicubic up-sampling, to the last scale's size, of the code vectors of scale s)

    Scale s + 1 sees sum s, averaged on its own grid. phi is a 3x3 convolution. All of it in float32. With gains, the
    vectors of scale s are the code vectors times its own: codes in groups have a grid for each group at each scale,
    whose gains are 0 for the channels of the others.

    The code vectors and phis are those of the tokenizer, frozen (buffers), or where the codes came without them the
    prior's own, which learn (parameters).
    """

    codebook: Tensor  # k d
    phi_weight: Tensor  # s-1 d d 3 3
    phi_bias: Tensor  # s-1 d
    gains: Tensor | None  # s d

    def __init__(self, code_spec: CodeSpec, width: int | None, gains: bool = False) -> None:
        """width: d of the tokenizer's code vectors, for `fill`; None: learned ones; gains: whether it has them."""
        super().__init__()
        finest = code_spec.grids[-1]
        self.shapes = [(grid.height, grid.width) for grid in code_spec.grids]
        d = width or LEARNED_WIDTH
        phi = torch.zeros(len(self.shapes) - 1, d, d, 3, 3)
        phi[..., 1, 1] = torch.eye(d)  # the identity
        tensors = {
            "codebook": torch.randn(finest.vocabulary, d),
            "phi_weight": phi,
            "phi_bias": torch.zeros(len(self.shapes) - 1, d),
        }
        for name, tensor in tensors.items():
            if width is None:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("gains", torch.ones(len(self.shapes), d) if gains else None)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the tokenizer's, by the names here. Raises UserError when they are not of these codes."""
        given, expected = ({n: tuple(t.shape) for n, t in some.items()} for some in (tensors, self.state_dict()))
        if given != expected:
            raise UserError(f"the latents beside the codes have shapes {given}, expected {expected}: encode anew")
        self.load_state_dict(tensors)

    def forward(self, codes: Codes) -> Tensor:
        """What the codes of all scales but the first see: codes, b h w each -> b n d, scale after scale."""
        total, seen = None, []
        for number, grid in enumerate(codes[:-1]):
            total = self.add(total, grid, number)
            seen.append(self.seen_by(number + 1, total))
        return torch.cat(seen, dim=1)

    def corrected(self, codes: Codes, flips: Sequence[Tensor], by: Sequence[Tensor]) -> tuple[Codes, Codes]:
        """Codes, b h w each, to be told and to be given, of which those that are `flips` (bool) are given as in `by`:
        see the function `corrected`."""
        return corrected(self, codes, lambda number, wanted: torch.where(flips[number], by[number], wanted))

    def missing(self, number: int, rest: Tensor) -> Tensor:
        """Of latents b d h w what grid `number` has to describe, b n d: an average, as the tokenizer takes it."""
        return self.seen_by(number, rest)

    def wanted(self, codes: Tensor, missing: Tensor, number: int) -> Tensor:
        """The codes, b n, nearest to the vectors of these and what is missing beside them, b n d."""
        return self.nearest(self.vectors(codes, number) + missing, number)

    def vectors(self, codes: Tensor, number: int) -> Tensor:
        """Of codes, b n, of scale `number`: b n d, float32."""
        vectors = F.embedding(codes, self.codebook).float()
        return vectors if self.gains is None else vectors * self.gains[number].float()

    def nearest(self, vectors: Tensor, number: int) -> Tensor:
        """The codes whose vectors, at scale `number`, are nearest, `b n`, in float32; vectors: b n d. Numbers that no
        code of that scale moves are as far from all."""
        with torch.autocast(vectors.device.type, enabled=False):
            codebook = self.codebook.float()
            if self.gains is not None:
                codebook = codebook * self.gains[number].float()
            half_norms = codebook.square().sum(dim=1) / 2
            rows = max(1, AT_ONCE // (vectors.shape[1] * len(codebook)))
            return torch.cat([(half_norms - part @ codebook.T).argmin(dim=-1) for part in vectors.split(rows)])

    def add(self, total: Tensor | None, codes: Tensor, number: int) -> Tensor:
        """The sum, b d h w, after scale `number`, counted from 0. total: the one before it, None at the first; codes:
        b h w or in one row."""
        with torch.autocast(codes.device.type, enabled=False):
            height, width = self.shapes[number]
            vectors = rearrange(self.vectors(codes.flatten(1), number), "b (h w) d -> b d h w", h=height, w=width)
            grown = F.interpolate(vectors, size=self.shapes[-1], mode="bicubic")
            weight, bias = self.phi_weight[number].float(), self.phi_bias[number].float()
            grown = F.conv2d(grown, weight, bias, padding=1)
            return grown if total is None else total + grown

    def seen_by(self, number: int, total: Tensor) -> Tensor:
        """The sum before scale `number`, averaged on its grid: b n d."""
        return rearrange(F.interpolate(total, size=self.shapes[number], mode="area"), "b d h w -> b (h w) d")


class SummedScales(Protocol):
    """Latents that are sums of what each grid of codes adds: `ScaleLatents`, or those of bits."""

    shapes: list[tuple[int, int]]

    def add(self, total: Tensor | None, codes: Tensor, number: int) -> Tensor: ...

    def seen_by(self, number: int, total: Tensor) -> Tensor: ...

    def missing(self, number: int, rest: Tensor) -> Tensor: ...

    def wanted(self, codes: Tensor, missing: Tensor, number: int) -> Tensor: ...


def corrected(latents: SummedScales, codes: Codes, shown: Callable[[int, Tensor], Tensor]) -> tuple[Codes, Codes]:
    """Codes, b h w each, to be told and to be given. shown: (number of a grid, its codes to be told, b h w) -> those
    given, with mistakes.

    What a mistake leaves in the sum, the later scales are to mend: they are quantised anew, as the tokenizer would have
    from what is then missing (Han et al. 2024, arXiv:2412.04431, section 3.4). Of that the codes tell all but the
    rounding of each to a code vector: at a place of scale s are missing the vector of its code and, averaged on its
    grid, what the sum of the scales before would be less what it is."""
    told, given = list[Tensor](), list[Tensor]()
    was, now = None, None
    for number, grid in enumerate(codes):
        wanted = grid
        if was is not None and now is not None:
            missing = latents.missing(number, was - now)  # b n d
            found = latents.wanted(grid.flatten(1), missing, number)
            wanted = torch.where((missing == 0).all(dim=-1), grid.flatten(1), found).view_as(grid)
        told.append(wanted)
        given.append(shown(number, wanted))
        if number < len(codes) - 1:
            was, now = latents.add(was, grid, number), latents.add(now, given[-1], number)
    return tuple(told), tuple(given)
