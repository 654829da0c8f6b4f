"""A linear Gaussian model, whose log-likelihood is known: x = A z + c + noise, z ~ N(0, I), so x ~ N(c, A A^T + s^2 I).
Linear encoder and decoder hold it, and the posterior of full covariance its exact one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stage1_vae.likelihoods import Likelihood
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives.importance import importance_bound
from stage1_vae.objectives.terms import elbo
from stage1_vae.posteriors import FullCovarianceConfig
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.objectives.reference import objective

LATENTS, SIZE, SCALE = 2, (2, 3), 0.4
PIXELS = SIZE[0] * SIZE[1]


class Normal(Likelihood):
    """N(outputs, SCALE^2 I)."""

    discrete = False

    def __init__(self) -> None:
        super().__init__(None, 1)
        self.outputs = 1

    def log_prob(self, outputs: Tensor, images: Tensor) -> Tensor:
        return torch.distributions.Normal(outputs, SCALE).log_prob(images).sum(dim=(-3, -2, -1))


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return 0.5 * torch.randn(PIXELS, LATENTS, generator=generator), 0.3 * torch.randn(PIXELS, generator=generator)


def images_of(truth: tuple[Tensor, Tensor], count: int, seed: int) -> Tensor:
    (weight, bias), generator = truth, torch.Generator().manual_seed(seed)
    latents = torch.randn(count, LATENTS, generator=generator)
    noise = SCALE * torch.randn(count, PIXELS, generator=generator)
    return (latents @ weight.T + bias + noise).view(count, 1, *SIZE)


def exact_log_likelihood(truth: tuple[Tensor, Tensor], images: Tensor) -> Tensor:
    weight, bias = (part.double() for part in truth)
    covariance = weight @ weight.T + SCALE**2 * torch.eye(PIXELS)
    return torch.distributions.MultivariateNormal(bias, covariance).log_prob(images.flatten(1).double())


def linear_vae() -> VAE:
    torch.manual_seed(0)
    linear = DenseConfig(hidden=())
    config = VAEConfig(latents=LATENTS, encoder=linear, decoder=linear, posterior=FullCovarianceConfig())
    model = VAE(config, SIZE)
    model.decoder.likelihood = Normal()
    return model


@pytest.mark.slow
def test_a_trained_linear_vae_reaches_the_exact_log_likelihood(truth: tuple[Tensor, Tensor]):
    model, train, steps = linear_vae(), images_of(truth, 20_000, seed=1), 1200
    one, optimizer = objective("elbo"), torch.optim.Adam(model.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        one.loss(model, train[torch.randint(len(train), (500,))], step).loss.backward()
        optimizer.step()
        schedule.step()
    held_out = images_of(truth, 20_000, seed=2)
    with torch.no_grad():
        terms = model(held_out, draws=20)
    exact = exact_log_likelihood(truth, held_out).mean()
    for bound in (elbo(terms), terms.log_weights.mean(0), importance_bound(terms.log_weights)):
        assert bound.double().mean().item() == pytest.approx(exact.item(), abs=0.01)
    # Nothing is left to chance at the exact posterior: all draws of an image weigh the same.
    assert terms.log_weights.std(0).mean() < 0.1


def with_true_decoder(truth: tuple[Tensor, Tensor]) -> VAE:
    """Whose posterior nobody fitted."""
    model = linear_vae()
    (layer,) = model.decoder.network.layers.layers
    layer.weight.data.copy_(truth[0])
    layer.bias.data.copy_(truth[1])
    return model


def test_an_unfitted_posterior_comes_to_the_exact_log_likelihood_with_many_draws(truth: tuple[Tensor, Tensor]):
    model, images = with_true_decoder(truth), images_of(truth, 200, seed=3)
    with torch.no_grad():
        log_weights = torch.cat([model(images, draws=1000).log_weights for _ in range(5)])
    exact = exact_log_likelihood(truth, images)
    assert (exact - log_weights.mean(0)).mean() > 0.3  # the ELBO lies far below
    assert importance_bound(log_weights).mean().item() == pytest.approx(exact.mean().item(), abs=0.02)


def test_bounds_grow_with_draws_to_the_exact_log_likelihood(truth: tuple[Tensor, Tensor]):
    """Of fresh draws each, with standard errors over repeats."""
    model, images, repeats = with_true_decoder(truth), images_of(truth, 20, seed=3), 40
    exact = exact_log_likelihood(truth, images).mean()
    found = {}
    for draws in (1, 5, 50, 500):
        with torch.no_grad():
            log_weights = model(images, draws=draws * repeats).log_weights.unflatten(0, (draws, repeats))
        bounds = importance_bound(log_weights).mean(-1).double()  # of each repeat
        found[draws] = (bounds.mean().item(), bounds.std().item() / math.sqrt(repeats))
    for fewer, more in ((1, 5), (5, 50), (50, 500)):
        (low, low_error), (high, high_error) = found[fewer], found[more]
        assert high - low > -4 * math.hypot(low_error, high_error), found
    assert all(bound - 4 * error < exact for bound, error in found.values()), found
    assert found[5][0] - found[1][0] > 4 * math.hypot(found[5][1], found[1][1])
