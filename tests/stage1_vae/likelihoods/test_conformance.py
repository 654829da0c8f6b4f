"""What every likelihood owes its users: a table of configs times properties. A new kind is one row; a test fails until
it has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.model_io import load_pretrained
from stage1_vae.likelihoods import (
    LIKELIHOODS,
    BernoulliConfig,
    CategoricalConfig,
    GaussianConfig,
    Likelihood,
    LogisticMixtureConfig,
    build_likelihood,
)
from stage1_vae.vae import VAE, VAEConfig

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
BINARY = torch.tensor([-1.0, 1.0], dtype=torch.float64)

ROWS: dict[str, tuple[Any, Tensor | None]] = {  # a config, and the values of a number where there are finitely many
    "bernoulli": (BernoulliConfig(), BINARY),
    "categorical": (CategoricalConfig(), LEVELS),
    "logistic mixture": (LogisticMixtureConfig(components=3), LEVELS),
    "gaussian": (GaussianConfig(scale=0.3), None),
    "gaussian, learned": (GaussianConfig(variance="learned", scale=0.2), None),
    "gaussian, per pixel": (GaussianConfig(variance="per_pixel", scale=0.2), None),
    "gaussian, optimal": (GaussianConfig(variance="optimal", scale=0.4), None),
}


@pytest.fixture(params=ROWS, ids=list(ROWS))
def row(request: pytest.FixtureRequest) -> tuple[Any, Tensor | None]:
    return ROWS[request.param]


def made(config: Any, channels: int = 1) -> Likelihood:
    return build_likelihood(config, channels).eval()


def outputs_of(likelihood: Likelihood, pixels: int) -> Tensor:
    """o 1 n, float64"""
    return torch.randn(likelihood.outputs, 1, pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def images_of(values: Tensor | None, *shape: int) -> Tensor:
    """float32"""
    of = LEVELS if values is None else values
    return of[torch.randint(len(of), shape)].float()


def log_p_of(likelihood: Likelihood, outputs: Tensor, values: Tensor) -> Tensor:
    """Of one grey pixel, given its outputs: v values -> v."""
    return likelihood.log_prob(outputs, values[:, None, None, None].to(outputs.dtype))


def test_every_kind_has_a_row():
    assert {config.kind for config, _ in ROWS.values()} == set(LIKELIHOODS)
    assert {config.variance for config, _ in ROWS.values() if config.kind == "gaussian"} == {
        "fixed",
        "learned",
        "per_pixel",
        "optimal",
    }


def test_probabilities_add_up_to_one(row):
    config, values = row
    likelihood = made(config)
    for outputs in outputs_of(likelihood, 8).split(1, dim=2):
        if likelihood.discrete:
            assert values is not None
            total = log_p_of(likelihood, outputs, values).exp().sum()
        else:
            x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
            total = torch.trapezoid(log_p_of(likelihood, outputs, x).exp(), x)
        assert total.item() == pytest.approx(1, abs=1e-9)


def test_mean_and_mode_are_those_of_all_values(row):
    config, values = row
    likelihood = made(config)
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64) if values is None else values
    for outputs in outputs_of(likelihood, 8).split(1, dim=2):
        log_p = log_p_of(likelihood, outputs, x)
        expected = (log_p.exp() * x).sum() / log_p.exp().sum()
        assert likelihood.mean(outputs).item() == pytest.approx(expected.item(), abs=2e-6)
        if values is None:
            assert likelihood.mode(outputs).item() == pytest.approx(x[log_p.argmax()].item(), abs=1e-3)
        else:
            assert likelihood.mode(outputs).item() == pytest.approx(values[log_p.argmax()].item(), abs=1e-6)


def test_draws_are_as_frequent_as_their_probability_says(row):
    config, values = row
    likelihood = made(config)
    count = 100_000
    outputs = outputs_of(likelihood, 1)
    draws = likelihood.sample(outputs.expand(count, -1, -1, -1)).flatten().double()
    if values is None:
        middles, width = torch.linspace(-3, 3, 31, dtype=torch.float64), 0.2
        inside = torch.linspace(-width / 2, width / 2, 201, dtype=torch.float64)
        density = log_p_of(likelihood, outputs, (middles[:, None] + inside).flatten()).exp().view(31, 201)
        p = torch.trapezoid(density, inside)
        seen = torch.stack([((draws - middle).abs() < width / 2).sum() for middle in middles])
    else:
        p = log_p_of(likelihood, outputs, values).exp()
        seen = torch.stack([((draws - value).abs() < 1e-6).sum() for value in values])
        assert seen.sum() == count  # nothing else is ever drawn
    often = p * count > 20
    error = (p * (1 - p) * count).sqrt()
    assert often.any()
    assert ((seen - p * count).abs() < 4 * error)[often].all()


def test_a_generator_decides_the_draws(row):
    likelihood = made(row[0], 3)
    outputs = outputs_of(likelihood, 50)
    first, again, other = (likelihood.sample(outputs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_leading_axes_broadcast(row, channels: int):
    config, values = row
    likelihood = made(config, channels)
    outputs = torch.randn(4, 2, likelihood.outputs, 3, 2)
    images = images_of(values, 2, channels, 3, 2)
    found = likelihood.log_prob(outputs, images)
    assert found.shape == (4, 2)
    assert found.dtype == torch.float32
    for draw in range(4):
        for image in range(2):
            torch.testing.assert_close(found[draw, image], likelihood.log_prob(outputs[draw, image], images[image]))
    more = likelihood.log_prob(outputs[0, 0], images)
    torch.testing.assert_close(more[1], likelihood.log_prob(outputs[0, 0], images[1]))
    for image in (likelihood.mean(outputs), likelihood.mode(outputs), likelihood.sample(outputs)):
        assert image.shape == (4, 2, channels, 3, 2)


def test_gradients_are_those_of_float64(row):
    """By central differences, of the outputs of one pixel."""
    likelihood = made(row[0], 3).double()
    for _ in range(3):
        outputs = torch.randn(likelihood.outputs, 1, 1, dtype=torch.float64) * 0.5
        images = images_of(row[1], 3, 1, 1)
        single = outputs.float().requires_grad_()
        (found,) = torch.autograd.grad(likelihood.log_prob(single, images), single)
        for place in range(0, likelihood.outputs, max(1, likelihood.outputs // 40)):
            step = torch.zeros_like(outputs)
            step[place] = 1e-5
            ahead, back = (likelihood.log_prob(outputs + sign * step, images.double()) for sign in (1, -1))
            slope = (ahead - back) / 2e-5
            assert found[place].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-5)


def test_extreme_outputs_stay_finite(row):
    config, values = row
    likelihood = made(config, 3)
    extreme = 60.0 if config.kind == "gaussian" else 1e4
    sizes = torch.tensor([-extreme, -30, 0, 30, extreme])
    outputs = sizes[torch.randint(5, (200, likelihood.outputs, 1, 1))].requires_grad_()
    images = images_of(values, 200, 3, 1, 1)
    log_p = likelihood.log_prob(outputs, images)
    assert log_p.isfinite().all()
    assert torch.autograd.grad(log_p.sum(), outputs)[0].isfinite().all()
    for image in (likelihood.mean(outputs), likelihood.mode(outputs), likelihood.sample(outputs)):
        assert image.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_models_come_back_with_their_likelihood(row, channels: int, tmp_path):
    model = VAE(VAEConfig(channels=channels, latents=2, likelihood=row[0]), (4, 3)).eval()
    for parameter in model.decoder.likelihood.parameters():
        parameter.data += 0.5
    model.save_pretrained(tmp_path / "model")
    again = load_pretrained(tmp_path / "model", {"vae": VAE})
    images = -torch.ones(2, channels, 4, 3)
    noise = torch.zeros(3, 2, 2)
    torch.testing.assert_close(again(images, noise=noise).log_weights, model(images, noise=noise).log_weights)
    assert again.config == model.config
