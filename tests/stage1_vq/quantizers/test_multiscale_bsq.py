"""Bits of scales beside a slow reference, gradients, entropies beside a table of all codes, and wrong configs. More in
test_conformance.py and, beside the original, ../imports/test_infinity.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers.multiscale_bsq import MultiscaleBSQConfig, MultiscaleBSQuantizer


def make(**settings: Any) -> MultiscaleBSQuantizer:
    return MultiscaleBSQuantizer(MultiscaleBSQConfig(**{"scales": (1, 2, 4), "dim": 3, **settings}))


def latents(b: int = 2, d: int = 3, h: int = 4, w: int = 4) -> Tensor:
    return torch.randn(b, d, h, w, generator=torch.Generator().manual_seed(1))


def test_each_scale_has_the_signs_of_what_the_sum_before_it_leaves():
    """Place by place: averages of windows, signs, and a sum in which each place of the map looks at its own window."""
    quantizer, z = make(scales=(1, 4)), latents()
    first, second = quantizer.codes(z)
    for image in range(2):
        mean = z[image].mean((1, 2))
        assert int(first[image]) == sum(2 ** (2 - bit) for bit in range(3) if mean[bit] > 0)
        corner = torch.where(mean > 0, 1.0, -1.0) / math.sqrt(3)
        for row, column in itertools.product(range(4), range(4)):
            rest = z[image, :, row, column] - corner
            assert int(second[image, row, column]) == sum(2 ** (2 - bit) for bit in range(3) if rest[bit] > 0)
    expected = corner[:, None, None] + torch.where(z[1] - corner[:, None, None] > 0, 1.0, -1.0) / math.sqrt(3)
    torch.testing.assert_close(quantizer.codes_to_latents((first, second))[1], expected)


def test_the_first_scales_are_the_first_of_the_sums_also_where_a_scale_has_several_grids():
    quantizer, z = make(bits_per_code=2), latents()
    codes, (_, sums, _) = quantizer.codes(z), quantizer.walk(z)
    assert len(codes) == 6
    for scale, expected in enumerate(sums):
        torch.testing.assert_close(quantizer.latents_of_first(codes[: 2 * scale + 2], 4, 4), expected)
    with pytest.raises(UserError, match="got codes of 3 grids, expected a multiple of 2"):
        quantizer.latents_of_first(codes[:3], 4, 4)


def test_gradients_pass_straight_through_and_the_commitment_pulls_to_each_sum():
    quantizer, z = make(entropy_weight=0.0, commitment_weight=0.5), latents().requires_grad_()
    quantized = quantizer(z)
    weights = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((quantized.z_q * weights).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weights)
    assert set(quantized.losses) == {"commitment_loss"}
    _, sums, _ = quantizer.walk(z.detach())
    assert len(sums) == 3
    expected = sum((z.detach() - total).square().mean() for total in sums) / 3 * 0.5
    torch.testing.assert_close(quantized.losses["commitment_loss"], expected)
    (pull,) = torch.autograd.grad(quantized.losses["commitment_loss"], z)
    torch.testing.assert_close(pull, sum(0.5 * 2 * (z.detach() - total) / z.numel() for total in sums) / 3)


def test_entropies_are_those_of_a_softmax_over_all_corners_in_each_scale():
    """Of three bits: 8 corners. The soft assignment of a direction to them; its bits are independent of each other."""
    quantizer, z = make(inverse_temperature=1.3, entropy_weight=0.7, diversity=0.4).train(), latents().requires_grad_()
    quantized = quantizer(z)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3))) / math.sqrt(3)
    of_places, of_bits = [], []
    for rest in quantizer.walk(z)[0]:
        rows = F.normalize(rest, dim=1).permute(0, 2, 3, 1).reshape(-1, 3)
        shares = (-1.3 * torch.cdist(rows, corners).square()).softmax(1)
        of_places.append(-(shares * shares.log()).sum(1).mean())
        ones = (shares[:, :, None] * (corners > 0)).sum(1).mean(0)
        of_bits.append(-(ones * ones.log() + (1 - ones) * (1 - ones).log()).sum())
    sample, batch = torch.stack(of_places).mean(), torch.stack(of_bits).mean()
    torch.testing.assert_close(quantized.losses["entropy_loss"], 0.7 * sample)
    torch.testing.assert_close(quantized.losses["diversity_loss"], -0.7 * 0.4 * batch)
    for name, expected in (("entropy_loss", 0.7 * sample), ("diversity_loss", -0.7 * 0.4 * batch)):
        ours, theirs = (
            torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (quantized.losses[name], expected)
        )
        torch.testing.assert_close(ours, theirs)
    assert set(quantizer.eval()(z).losses) == {"commitment_loss"}


def test_many_bits_are_several_grids_of_each_scale():
    quantizer, z = make(dim=7, bits_per_code=3), latents(d=7)
    spec = quantizer.grids(4, 4)
    assert [grid.name for grid in spec[:4]] == ["scale0_bits0", "scale0_bits1", "scale0_bits2", "scale1_bits0"]
    assert [grid.vocabulary for grid in spec[:3]] == [8, 8, 2]
    whole = make(dim=7)
    assert [grid.name for grid in whole.grids(4, 4)] == ["scale0", "scale1", "scale2"]
    parts, numbers = quantizer.codes(z), whole.codes(z)
    for scale in range(3):
        high, middle, low = parts[3 * scale : 3 * scale + 3]
        assert torch.equal(16 * high + 2 * middle + low, numbers[scale])
    assert torch.equal(quantizer.codes_to_latents(parts), whole.codes_to_latents(numbers))


def test_later_scales_and_bits_go_by_those_that_were_chosen():
    quantizer, z = make(dim=7, bits_per_code=3), latents(d=7)
    own = quantizer.codes(z)
    chosen = tuple(grid ^ 1 for grid in own[:4])  # all of the first scale, and the first grid of the second
    after = quantizer.codes_after(z, chosen)
    assert all(torch.equal(one, other) for one, other in zip(after, chosen, strict=False))
    assert any(not torch.equal(one, other) for one, other in zip(after[4:], own[4:], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(quantizer.codes_after(z, own[:4]), own, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, "one or more rising sides"),
        ({"scales": (2, 2)}, "one or more rising sides"),
        ({"dim": 0}, "dim=0, expected at least 1"),
        ({"bits_per_code": 17}, "bits_per_code=17, expected from 1 to 16"),
        ({"entropy_weight": -1.0}, "entropy_weight=-1.0, expected 0"),
        ({"inverse_temperature": 0.0}, "inverse_temperature=0.0, expected above 0"),
        ({"commitment_weight": -0.1}, "commitment_weight=-0.1, expected 0 or more"),
    ],
)
def test_wrong_configs_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MultiscaleBSQConfig(**settings)
