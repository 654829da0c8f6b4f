"""Shares of a distribution, perturbed or rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers.fsp import DISTRIBUTIONS, FSPConfig, FSPQuantizer


def make(**settings: Any) -> FSPQuantizer:
    torch.manual_seed(0)
    return FSPQuantizer(FSPConfig(**{"levels": (5, 4), "dim": 2, **settings}))


def latents(b: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(b, 2, 6, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_inverse_undoes_the_share_and_moments_are_those_of_the_distribution(name):
    distribution = DISTRIBUTIONS[name]
    z = torch.linspace(-4, 4, 101, dtype=torch.float64)
    shares = distribution.share(z)
    assert (shares.diff() > 0).all()
    torch.testing.assert_close(distribution.inverse(shares), z)
    if name != "cauchy":  # which has none
        drawn = distribution.inverse((torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6)
        assert abs(drawn.mean()) < 1e-6
        torch.testing.assert_close(drawn.var().item(), distribution.variance, rtol=2e-3, atol=0)
        kurtosis = (drawn / drawn.std()).pow(4).mean().item() - 3
        torch.testing.assert_close(kurtosis, distribution.kurtosis, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("as_latents", [False, True])
def test_training_moves_each_number_by_at_most_half_a_part_and_eval_rounds_it_to_a_middle(as_latents):
    quantizer, z = make(as_latents=as_latents), latents()
    shares = quantizer.distribution.share(z)

    def share_of(z_q: Tensor) -> Tensor:
        return quantizer.distribution.share(z_q) if as_latents else z_q * 12**-0.5 + 0.5

    moved = (share_of(quantizer(z).z_q) - shares) * quantizer.levels
    assert 0.4 < moved.abs().max() <= 0.5001
    assert len(moved.unique()) > 200, "noise, no grid"
    rounded = share_of(quantizer.eval()(z).z_q) * quantizer.levels - 0.5
    torch.testing.assert_close(rounded, rounded.round(), rtol=0, atol=1e-4)
    assert ((share_of(quantizer(z).z_q) - shares) * quantizer.levels).abs().max() <= 0.5001


def test_the_share_that_training_rounds_is_the_configs():
    quantizer, z = make(quantized_share=0.3, levels=(4, 4)), latents(200)
    assert torch.equal(quantizer(z).codes[0], quantizer.eval()(z).codes[0])
    on_the_grid = (quantizer.train()(z).z_q - quantizer.eval()(z).z_q).abs() < 1e-5
    assert abs(on_the_grid.float().mean() - 0.3) < 0.02
    everything = make(quantized_share=1.0)
    torch.testing.assert_close(everything(z).z_q, everything.eval()(z).z_q)


def test_the_gradient_is_the_slope_of_the_share_and_through_the_inverse_one():
    z = latents().requires_grad_()
    make(moments=0)(z).z_q.sum().backward()
    slope = (1 - z.detach().tanh() ** 2) / 2 * 12**0.5
    torch.testing.assert_close(z.grad, slope)
    z.grad = None
    make(moments=0, as_latents=True)(z).z_q.sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))


def test_the_moments_loss_draws_latents_to_the_distribution():
    z = (3 * latents(40) + 2).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.05)
    quantizer = make(moments=2)
    before = quantizer(z).losses["moments_loss"].item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = quantizer(z).losses["moments_loss"]
        loss.backward()
        optimizer.step()
    assert loss < before / 100
    assert abs(z.mean()) < 0.5 < abs(3 * latents(40) + 2).mean()
    assert abs(z.var() - 0.8225) < 0.5 < 5 < (3 * latents(40)).var()
    skewed = z.detach().exp()
    assert make(moments=4)(skewed).losses["moments_loss"] > make(moments=2)(skewed).losses["moments_loss"] + 0.05
    assert not make(moments=0)(z).losses
    assert make().eval()(z).losses == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (5, 1)}, "levels=.*expected numbers of at least 2"),
        ({"levels": (4096, 8192)}, "a product of at most"),
        ({"distribution": "gauss"}, "distribution=gauss, expected one of tanh, sigmoid"),
        ({"quantized_share": 1.5}, "quantized_share=1.5, expected a share from 0 to 1"),
        ({"moments": 3}, "moments=3, expected 0, 2 or 4"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FSPConfig(**settings)
