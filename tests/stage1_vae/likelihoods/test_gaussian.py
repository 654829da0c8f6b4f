from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from stage1_vae.likelihoods.gaussian import Gaussian, GaussianConfig, log_density
from tests.golden import golden_vae


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs 5 4 2 3 3 and images 4 2 3 3, of 5 draws."""
    return torch.randn(5, 4, 2, 3, 3, dtype=torch.double) * 0.3, torch.rand(4, 2, 3, 3, dtype=torch.double) * 2 - 1


def test_the_optimal_variance_is_the_most_likely_one():
    outputs, images = data()
    likelihood = Gaussian(GaussianConfig(variance="optimal"), 2).train()
    best = likelihood.log_prob(outputs, images).sum()
    scales = torch.linspace(-2, 1, 3001, dtype=torch.double)
    others = torch.stack([log_density(images, outputs, scale).sum() for scale in scales])
    assert best >= others.max()
    assert best - others.max() < 1e-3


def test_the_optimal_variance_gives_the_logarithm_of_the_error():
    """Rybkin et al. 2021, section 3.2: the loss is D / 2 (log(2 pi MSE) + 1), and its gradient too."""
    outputs, images = data()
    outputs.requires_grad_()
    likelihood = Gaussian(GaussianConfig(variance="optimal"), 2).train()
    loss = -likelihood.log_prob(outputs, images).mean()
    error = (images - outputs).square().mean()
    expected = 18 / 2 * ((2 * math.pi * error).log() + 1)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, outputs)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_the_scale_of_validations_follows_the_optimal_one():
    outputs, images = data()
    likelihood = Gaussian(GaussianConfig(variance="optimal"), 2).train()
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (-likelihood.log_prob(outputs, images).mean()).backward()
        optimizer.step()
    trained = likelihood.log_prob(outputs, images).sum()
    validated = likelihood.eval().log_prob(outputs, images)
    assert validated.sum().item() == pytest.approx(trained.item(), abs=0.05)
    torch.testing.assert_close(likelihood.log_prob(outputs[:, :1], images[:1]), validated[:, :1])  # each by itself
    spread = (likelihood.sample(torch.zeros(20_000, 2, 1, 1))).std().item()
    assert spread == pytest.approx((images - outputs).square().mean().sqrt().item(), rel=0.03)


def test_a_learned_variance_is_trained_by_the_likelihood():
    outputs, images = data()
    likelihood = Gaussian(GaussianConfig(variance="learned", scale=0.7), 2).double()
    likelihood.log_prob(outputs, images).sum().backward()
    assert likelihood.log_scale.grad is not None
    error, step = (images - outputs).square(), 1e-5
    limit = -6.0

    def total(raw: float) -> float:
        scale = math.exp(limit + math.log1p(math.exp(raw - limit)))
        return (-0.5 * error / scale**2 - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum().item()

    start = math.log(0.7)
    assert likelihood.log_prob(outputs, images).sum().item() == pytest.approx(total(start))
    slope = (total(start + step) - total(start - step)) / (2 * step)
    assert likelihood.log_scale.grad.item() == pytest.approx(slope, rel=1e-5)


def test_scales_bend_before_the_smallest():
    outputs, images = torch.cat([torch.zeros(1, 1, 1), torch.full((1, 1, 1), -50.0)]), torch.full((1, 1, 1), 0.1)
    outputs.requires_grad_()
    found = Gaussian(GaussianConfig(variance="per_pixel", smallest_log_scale=-4.0), 1).log_prob(outputs, images)
    torch.testing.assert_close(found, log_density(images, torch.zeros(1, 1, 1), torch.tensor(-4.0)).sum())
    perfect = Gaussian(GaussianConfig(variance="optimal", smallest_log_scale=-4.0), 1).log_prob(images, images)
    torch.testing.assert_close(perfect, torch.tensor(4 - 0.5 * math.log(2 * math.pi)))


@pytest.mark.parametrize(
    "change", [{"variance": "optimal"}, {"scale": 0.5}, {"variance": "per_pixel", "smallest_log_scale": 0.5}]
)
def test_every_field_changes_the_result(change):
    config = GaussianConfig()
    outputs, images = data()
    outputs = torch.cat([outputs, torch.full_like(outputs, -1)], dim=2)

    def of(config: GaussianConfig) -> torch.Tensor:
        likelihood = Gaussian(config, 2)
        return likelihood.log_prob(outputs[:, :, : likelihood.outputs], images)

    assert not torch.allclose(of(config), of(replace(config, **change)))
    if "smallest_log_scale" in change:
        assert not torch.allclose(of(replace(config, variance="per_pixel")), of(replace(config, **change)))


def test_bad_fields_are_refused():
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"likelihood\.scale=.*, expected a number above 0"):
            GaussianConfig(scale=scale)
    with pytest.raises(UserError, match=r"likelihood\.smallest_log_scale=nan, expected a number"):
        GaussianConfig(smallest_log_scale=math.nan)


def test_nvae():
    """Its log-scales pass through 5 tanh(x / 5), as its means do, and 0.01 is added to its scales."""
    published = golden_vae("nvae_parts")
    means, raw = (5 * (part / 5).tanh() for part in published.inputs["normal_param"].chunk(2, dim=1))
    log_scales = (raw.exp() + 0.01).log()
    images = published.inputs["x8"] * 2 - 1
    published.check("normal/log_prob", log_density(images, means, log_scales))
