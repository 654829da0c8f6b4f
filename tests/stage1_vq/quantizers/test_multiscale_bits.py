"""Scales of signs are their paper's loop; the published numbers are in test_xqgan_golden.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from codes.spec import CodeSpec
from common.errors import UserError
from stage1_vq.quantizers.multiscale_bits import MultiscaleBitsConfig, MultiscaleBitsQuantizer
from stage2_prior.priors.scale_latents import ScaleLatents


def make(**settings: Any) -> MultiscaleBitsQuantizer:
    torch.manual_seed(0)
    defaults = {"scales": (1, 2, 4), "bits": 5, "dim": 5, "phis": 2, "inverse_temperature": 1.0}
    return MultiscaleBitsQuantizer(MultiscaleBitsConfig(**{**defaults, **settings}))


def latents(b: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(b, 5, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("unit", [False, True])
def test_codes_and_latents_are_those_of_the_slow_loop(unit):
    quantizer, z = make(unit_length=unit, ratio=0.5), latents()
    quantized = quantizer(z)
    f = F.normalize(z, dim=1) if unit else z
    total = torch.zeros_like(z)
    for number, side in enumerate((1, 2, 4)):
        rest = F.avg_pool2d(f - total, 4 // side)
        corner = (5**-0.5 if unit else 1.0) * 0.5**number
        signs = torch.where(rest > 0, corner, -corner)
        places = torch.tensor([16, 8, 4, 2, 1]).view(1, 5, 1, 1)
        assert torch.equal(quantized.codes[number], ((rest > 0) * places).sum(1))
        grown = F.interpolate(signs, size=(4, 4), mode="bicubic") if side < 4 else signs
        total = total + 0.5 * grown + 0.5 * quantizer.phis[[0, 0, 1][number]](grown)
    torch.testing.assert_close(quantized.z_q, total)


def test_entropies_are_those_of_a_soft_assignment_to_every_corner():
    quantizer, z = make(ratio=0.5, entropy_weight=0.3, diversity=0.5), latents().requires_grad_()
    losses = quantizer(z).losses
    dense_z = z.detach().clone().requires_grad_()
    codes, total, samples, batches = quantizer.codes(z), torch.zeros_like(z), [], []
    every = torch.cartesian_prod(*5 * [torch.tensor([-1.0, 1.0])])
    for number, grid in enumerate(codes):
        rows = rearrange(dense_z - total, "b d h w -> (b h w) d")
        soft = (-torch.cdist(rows, every * 0.5**number).square()).softmax(1)
        samples.append(-(soft * soft.log()).sum(1).mean())
        batches.append(-(soft.mean(0) * soft.mean(0).log()).sum())
        total = (total + quantizer.grow(grid, number, (4, 4))).detach()
    expected = 0.3 * (torch.stack(samples).mean() - 0.5 * torch.stack(batches).mean())
    found = losses["entropy_loss"] + losses["diversity_loss"]
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(z.grad, dense_z.grad, rtol=1e-4, atol=1e-7)


def test_each_loss_has_a_gradient_to_what_it_is_for_and_nothing_else():
    quantizer, z = make(), latents().requires_grad_()
    losses = quantizer(z).losses
    losses["codebook_loss"].backward(retain_graph=True)
    assert z.grad is None
    assert all(weight.grad.abs().sum() > 0 for weight in quantizer.parameters())
    quantizer.zero_grad()
    for name in ("commitment_loss", "entropy_loss", "diversity_loss"):
        z.grad = None
        losses[name].backward(retain_graph=True)
        assert z.grad.abs().sum() > 0, name
    assert all(weight.grad is None for weight in quantizer.parameters())


@torch.no_grad()
def test_a_next_scale_prior_sums_what_the_quantizer_sums():
    quantizer = make(ratio=0.5, unit_length=True)
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter)
    codes = quantizer.codes(latents())
    shared = quantizer.scale_latents() or {}
    prior = ScaleLatents(CodeSpec(quantizer.grids(4, 4), 16, 16), 5, gains=True)
    prior.fill(shared)
    expected = torch.cat([rearrange(x, "b d h w -> b (h w) d") for x in quantizer.next_scale_inputs(codes)], 1)
    torch.testing.assert_close(prior(codes), expected, rtol=0, atol=1e-5)
    assert make(bits=18, entropy_bits=9, dim=18).scale_latents() is None  # nor a prior with 2^18 outputs


def test_the_start_puts_each_bit_on_both_sides():
    quantizer, z = make(dim=5, bits=4), latents(b=64) + 3
    quantizer.initialise([z[:40], z[40:]])
    signs = (quantizer.narrow(z) > 0).float().mean((0, 2, 3))
    assert 0.35 < signs.min() <= signs.max() < 0.65


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0, expected above 0 and at most 1"),
        ({"bits": 30}, "bits=30, expected from 1 to 24"),
        ({"scales": (4, 2)}, r"scales=\(4, 2\), expected one or more rising sides"),
        ({"phis": 4}, r"phis=4, expected one of \[1, 2, 3\], of which"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_a_config_survives_json_and_a_warning_names_fields_that_exist():
    quantizer = make(bits=12, dim=5)
    assert MultiscaleBitsQuantizer.config_from({**asdict(quantizer.config), "scales": [1, 2, 4]}) == quantizer.config
    quantizer(latents())
    quantizer.update()
    metrics = {name: float(value) for name, value in quantizer.health(steps_per_epoch=1).items()}
    (line,) = quantizer.warnings(metrics, 1)
    assert "try a higher model.quantizer.entropy_weight, or fewer model.quantizer.bits" in line
