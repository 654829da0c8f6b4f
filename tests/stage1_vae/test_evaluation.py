"""Figures of VAEs against integrals over the plane of their latents, and what holds of them whatever the model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from stage1_vae.aggregate import Aggregate, AggregateFigures
from stage1_vae.evaluation import (
    BLOCK,
    ImageFigures,
    active_units,
    draws_at_once,
    grouped_bound,
    judge,
    mean_of,
    noise_of_draws,
)
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives.terms import elbo
from stage1_vae.posteriors import POSTERIORS, build_posterior
from stage1_vae.vae import VAE, VAEConfig

STEP = 0.04


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 2, (6, 1, 3, 3), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


@pytest.fixture(scope="module")
def model() -> VAE:
    """Of two latents, whose posteriors are not the true ones, though they overlap."""
    torch.manual_seed(3)
    config = VAEConfig(latents=2, encoder=DenseConfig(hidden=(8,)), decoder=DenseConfig(hidden=(8,), activation="tanh"))
    model = VAE(config, (3, 3)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(3 if name.startswith("decoder") else 1.5)
        model.encoder.layers.layers[-1].bias[2:] = -0.3
    return model


@pytest.fixture(scope="module")
def plane() -> Tensor:
    """n 2: a grid that all of N(0, I) and of the posteriors lies on."""
    axis = torch.arange(-9, 9, STEP)
    return torch.cartesian_prod(axis, axis)


def integral(log_density: Tensor) -> Tensor:
    """log of the integral over the plane, `n ...` -> `...`."""
    return log_density.double().logsumexp(0) + 2 * math.log(STEP)


@torch.no_grad()
def exact_log_p(model: VAE, images: Tensor, plane: Tensor) -> Tensor:
    latents = plane.unsqueeze(1).expand(-1, len(images), -1)
    return integral(model.prior.log_density(latents).sum(-1) + model.decoder.log_likelihood(latents, images))


@pytest.fixture(scope="module")
def figures(model: VAE, images: Tensor) -> ImageFigures:
    return judge(model, images, range(6), 20_000, seed=5)


def test_log_p_is_the_integral_over_the_latents(model, images, plane, figures: ImageFigures):
    apart = (figures.log_p - exact_log_p(model, images, plane)).abs()
    assert (figures.log_p_error < 0.1).all()
    assert (apart < 4 * figures.log_p_error).all()
    assert (figures.gap > 20 * figures.gap_error).all()  # the posteriors are not the true ones: the test is one


def test_standard_errors_are_the_spread_over_seeds(model, images):
    found = [judge(model, images, range(6), 400, seed=seed) for seed in range(150)]
    for name in ("log_p", "elbo", "gap"):
        values = torch.stack([getattr(one, name) for one in found])
        said = torch.stack([getattr(one, f"{name}_error") for one in found]).mean(0)
        assert (values.std(0) / said - 1).abs().max() < 0.3
    for k in (1, 5, 50):
        values = torch.stack([one.bounds[k] for one in found])
        said = torch.stack([one.bound_errors[k] for one in found]).mean(0)
        assert (values.std(0) / said - 1).abs().max() < 0.4
    means = [mean_of(one.log_p, one.log_p_error) for one in found]
    spread = torch.tensor([mean.value for mean in means]).std()
    assert abs(spread / means[0].draws_error - 1) < 0.3


def test_the_error_over_images_is_the_spread_over_sets_of_images():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    errors = torch.full((40,), 0.3, dtype=torch.float64)
    said = torch.tensor([mean_of(one, errors).images_error for one in values]).mean()
    assert abs(values.mean(1).std() / said - 1) < 0.15
    assert mean_of(values[0], errors).draws_error == pytest.approx(0.3 / math.sqrt(40))
    assert mean_of(values[0, :1], errors[:1]).images_error == math.inf


def test_bounds_rise_to_log_p_and_the_first_is_the_elbo(model, images, plane, figures: ImageFigures):
    found = judge(model, images, range(6), 5000, bounds=(1, 5, 50, 500, 5000))
    assert list(found.bounds) == [1, 5, 50, 500, 5000]
    values = torch.stack(list(found.bounds.values()))
    assert (values.diff(dim=0) >= 0).all()  # of the same draws: for each image, not only on average
    assert torch.equal(found.bounds[5000], found.log_p)
    error = (found.bound_errors[1].square() + found.elbo_error.square()).sqrt()
    assert ((found.bounds[1] - found.elbo).abs() < 4 * error).all()
    assert (found.elbo < exact_log_p(model, images, plane)).all()
    torch.testing.assert_close(found.elbo, found.log_likelihood - found.total_kl)


def test_one_draw_is_the_elbo_term_by_term(model, images):
    """L_1 of a single draw is its log p(x|z) + log p(z) - log q(z|x)."""
    found = judge(model, images, range(6), 1, seed=2)
    alone = model.posterior(images[:1])
    noise = noise_of_draws(alone, range(6), range(1), 2, images.device)
    with torch.no_grad():
        terms = model(images, noise=noise)
    torch.testing.assert_close(found.log_p, terms.log_weights[0].double())
    torch.testing.assert_close(found.log_likelihood, terms.log_likelihood[0].double())
    torch.testing.assert_close(found.elbo, elbo(terms).double())
    assert (found.log_p_error == math.inf).all()
    torch.testing.assert_close(found.kl[0], terms.exact_kl[0].double())


@pytest.mark.parametrize("at_once", [1, 7, BLOCK + 30, 10**6])
def test_chunks_change_nothing(model, images, at_once):
    images = images[:2]
    whole = judge(model, images, range(2), BLOCK + 70, at_once=5 * BLOCK)
    chunked = judge(model, images, range(2), BLOCK + 70, at_once=at_once)
    for name in ("log_p", "log_p_error", "elbo", "gap_error", "log_likelihood"):
        torch.testing.assert_close(getattr(whole, name), getattr(chunked, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.first_latents[0], chunked.first_latents[0])


def test_the_noise_of_an_image_goes_by_its_number_alone(model, images):
    whole = judge(model, images, [3, 1, 4, 15, 9, 2], 300)
    for place, number in ((2, 4), (5, 2)):
        alone = judge(model, images[place : place + 1], [number], 300)
        torch.testing.assert_close(alone.log_p, whole.log_p[place : place + 1], rtol=1e-5, atol=1e-5)
    other = judge(model, images[2:3], [5], 300)
    assert (other.log_p - whole.log_p[2:3]).abs() > 1e-4
    seeded = judge(model, images[2:3], [4], 300, seed=1)
    assert (seeded.log_p - whole.log_p[2:3]).abs() > 1e-4


def test_draws_of_an_image_are_all_different(model, images):
    noise = noise_of_draws(model.posterior(images[:1]), [0, 1], range(BLOCK, 3 * BLOCK + 5), 0, images.device)
    assert noise.shape == (2 * BLOCK + 5, 2, 2)
    assert len(noise.flatten().unique()) == noise.numel()
    first = noise_of_draws(model.posterior(images[:1]), [0, 1], range(3 * BLOCK), 0, images.device)
    assert torch.equal(first[BLOCK:], noise[: 2 * BLOCK])


def test_groups_of_draws_give_bounds_without_bias():
    """Of log-normal weights L_2 is known by quadrature: E log((e^a + e^b) / 2), a and b from N(0, 1)."""
    log_weights = torch.randn(200_001, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound, error = grouped_bound(log_weights, 2)
    difference = torch.linspace(-12, 12, 20_001, dtype=torch.float64)  # of a and b, from N(0, 2)
    density = torch.exp(-(difference**2) / 4) / math.sqrt(4 * math.pi)
    expected = torch.trapezoid(density * torch.log(torch.cosh(difference / 2)), difference)
    assert ((bound - expected).abs() < 4 * error).all()
    assert (error < 0.003).all()


def test_effective_draws_count_the_weights_that_matter():
    weights = torch.zeros(1000, 1, dtype=torch.float64)
    weights[0] = 50.0  # one draw weighs all
    relative = weights.softmax(0) * 1000
    assert float(1000**2 / relative.square().sum()) == pytest.approx(1)


def test_memory_is_bounded_by_the_largest_tensor(model, images):
    """The decoder's images, or a wider hidden layer."""
    assert draws_at_once(model, images) == 2**20 // 9
    wide = VAE(VAEConfig(latents=2, decoder=DenseConfig(hidden=(700,)), encoder=DenseConfig(hidden=())), (3, 3))
    assert draws_at_once(wide, images) == 2**20 // 700


def test_units_are_active_by_the_variance_of_their_means():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5000, 3, generator=generator) * torch.tensor([0.09, 0.11, 1.0]) + 7
    assert active_units(means).tolist() == [False, True, True]
    assert not active_units(means[:1]).any()


# ---- q(z) -----------------------------------------------------------------------------------------------------------


def aggregated(model: VAE, images: Tensor, figures: ImageFigures, *, batch: int) -> AggregateFigures:
    aggregate = Aggregate(figures, model.prior, model.shape)
    with torch.no_grad():
        for part in images.split(batch):
            aggregate.add(model.posterior(part))
    return aggregate.figures()


@torch.no_grad()
def test_figures_of_q_of_z_are_integrals(model, images, plane):
    """Each image many times, so that there are draws enough; the mixture is that of the six."""
    model = copy.deepcopy(model)
    layer = model.encoder.layers.layers[-1]
    layer.weight[:2] *= 4  # means far from each other, along a diagonal
    layer.weight[1] += layer.weight[0]
    many = images.repeat(300, 1, 1, 1)
    figures = judge(model, many, range(len(many)), 1)
    found = aggregated(model, many, figures, batch=450)
    posterior = model.posterior(images)
    each = posterior.log_density(plane.unsqueeze(1).expand(-1, 6, -1)).sum(-1).double()  # n 6
    log_q = each.logsumexp(1) - math.log(6)
    side = round(math.sqrt(len(plane)))
    density = log_q.exp().reshape(side, side)
    area = STEP**2
    assert float(density.sum() * area) == pytest.approx(1, abs=1e-4)
    information = ((each.exp() * (each - log_q.unsqueeze(1))).sum(0) * area).mean()
    log_prior = model.prior.log_density(plane.unsqueeze(1)).sum(-1)[:, 0].double()
    divergence = (log_q.exp() * (log_q - log_prior)).sum() * area
    marginals = [density.sum(1 - axis) * STEP for axis in (0, 1)]
    axis = plane[:side, 1].double()
    log_normal = -0.5 * axis**2 - 0.5 * math.log(2 * math.pi)
    of_dimensions = [float((one * (one.clamp(min=1e-300).log() - log_normal)).sum() * STEP) for one in marginals]
    correlation = float(divergence) - sum(of_dimensions)
    assert abs(found.mutual_information.value - information) < 4 * found.mutual_information.images_error
    assert abs(found.aggregate_kl.value - divergence) < 4 * found.aggregate_kl.images_error
    assert found.total_correlation is not None
    assert found.dimension_kl is not None
    assert abs(found.total_correlation.value - correlation) < 4 * found.total_correlation.images_error
    assert found.dimension_kl == pytest.approx(of_dimensions, abs=0.1)
    assert float(information) > 0.5
    assert correlation > 0.04
    parts = found.mutual_information.value + found.total_correlation.value + sum(found.dimension_kl)
    sampled = (figures.first_log_posterior - figures.first_log_prior).mean()
    assert parts == pytest.approx(float(sampled), abs=1e-4)


@pytest.mark.parametrize("kind", ["diagonal", "full_covariance", "rank_one"])
def test_marginals_are_integrals_over_the_other_numbers(kind, plane):
    layer = build_posterior(POSTERIORS[kind][1](), (2,))
    posterior = layer(0.7 * torch.randn(1, layer.features, generator=torch.Generator().manual_seed(4)))
    side = round(math.sqrt(len(plane)))
    density = posterior.log_density(plane.unsqueeze(1)).sum(-1).double().exp().reshape(side, side)
    marginals = posterior.log_marginals(plane.unsqueeze(1)).double().exp().reshape(side, side, 2)
    for axis in (0, 1):
        expected = density.sum(1 - axis) * STEP
        torch.testing.assert_close(marginals.select(1 - axis, 0)[..., axis], expected, rtol=1e-3, atol=1e-4)
    assert posterior.mean.abs().min() > 0.1


def test_batches_of_posteriors_change_nothing(model, images):
    figures = judge(model, images, range(6), 3)
    whole, parts = (aggregated(model, images, figures, batch=batch) for batch in (6, 2))
    for name in ("mutual_information", "aggregate_kl", "total_correlation"):
        for place in (0, 2):
            assert getattr(whole, name)[place] == pytest.approx(getattr(parts, name)[place], abs=1e-5)
    assert whole.dimension_kl == pytest.approx(parts.dimension_kl, abs=1e-5)


def test_information_is_at_most_the_logarithm_of_the_number_of_images(images):
    torch.manual_seed(0)
    model = VAE(VAEConfig(latents=2), (3, 3)).eval()
    with torch.no_grad():
        model.encoder.layers.layers[-1].weight.mul_(50)
        model.encoder.layers.layers[-1].weight[2:] = 0
        model.encoder.layers.layers[-1].bias[2:] = -8  # narrow posteriors far from each other
    figures = judge(model, images, range(6), 1)
    found = aggregated(model, images, figures, batch=6)
    distinct = len(torch.unique(images.flatten(1), dim=0))
    assert found.mutual_information.value == pytest.approx(math.log(distinct), abs=0.05)
    assert float(figures.total_kl.mean()) > 2 * math.log(6)
