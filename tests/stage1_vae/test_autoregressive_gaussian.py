from __future__ import annotations

import math

import pytest
import torch

from common.errors import UserError
from stage1_vae.posteriors import DiagonalGaussian, Posterior
from stage1_vae.posteriors.committed_rate import CommittedRateConfig, CommittedRateLayer, bounding_log_scales
from stage1_vae.priors import AutoregressiveGaussian, AutoregressiveGaussianConfig, StandardNormal, StandardNormalConfig


def prior_of(correlation: float, shape: tuple[int, ...]) -> AutoregressiveGaussian:
    return AutoregressiveGaussian(AutoregressiveGaussianConfig(correlation=correlation), shape)


def dense_covariance(correlation: float, steps: int) -> torch.Tensor:
    places = torch.arange(steps, dtype=torch.float64)
    return correlation ** (places[:, None] - places).abs()


def some_posterior(*shape: int) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(0)
    mean, log_scale = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return DiagonalGaussian(mean, 0.5 * log_scale)


def test_the_density_is_the_gaussians_of_covariance_alpha_to_the_distance():
    z = torch.randn(3, 4, 6, dtype=torch.float64)
    reference = torch.distributions.MultivariateNormal(torch.zeros(6).double(), dense_covariance(0.7, 6))
    torch.testing.assert_close(prior_of(0.7, (6,)).log_density(z).sum(-1), reference.log_prob(z))


def test_a_map_is_one_sequence_for_each_channel():
    z = torch.randn(2, 3, 2, 2, 3, dtype=torch.float64)
    reference = torch.distributions.MultivariateNormal(torch.zeros(6).double(), dense_covariance(0.4, 6))
    expected = reference.log_prob(z.flatten(-2)).sum(-1)
    terms = prior_of(0.4, (2, 2, 3)).log_density(z)
    assert terms.shape == (2, 3, 12)
    torch.testing.assert_close(terms.sum(-1), expected)


def test_kl_is_that_of_dense_gaussians():
    posterior = some_posterior(5, 7)
    dense = torch.distributions.MultivariateNormal(torch.zeros(7).double(), dense_covariance(0.9, 7))
    q = torch.distributions.MultivariateNormal(posterior.mean, torch.diag_embed(posterior.scale.square()))
    terms = prior_of(0.9, (7,)).kl(posterior)
    assert terms is not None
    assert terms.shape == (5, 7)
    assert (terms > 0).all()  # each is a mean of divergences
    torch.testing.assert_close(terms.sum(-1), torch.distributions.kl_divergence(q, dense))


def test_posteriors_of_another_kind_have_no_closed_form():
    assert prior_of(0.9, (7,)).kl(Posterior()) is None


def test_without_correlation_it_is_the_standard_normal():
    posterior, z = some_posterior(5, 7), torch.randn(2, 5, 7)
    prior, plain = prior_of(0.0, (7,)), StandardNormal(StandardNormalConfig(), (7,))
    torch.testing.assert_close(prior.kl(posterior), plain.kl(posterior))
    torch.testing.assert_close(prior.log_density(z), plain.log_density(z))
    assert prior.committed_rate == 0


@pytest.mark.parametrize("correlation", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(2,), (7,), (3, 2, 2)])
def test_no_independent_posterior_has_less_than_the_committed_rate(correlation: float, shape: tuple[int, ...]):
    prior = prior_of(correlation, shape)
    assert (prior.kl(some_posterior(500, *shape)).sum(-1) >= prior.committed_rate).all()
    steps = math.prod(shape) // prior.sequences
    precision = torch.linalg.inv(dense_covariance(correlation, steps)).diagonal()  # of each number given the others
    nearest = (-0.5 * precision.log()).repeat(prior.sequences).reshape(1, *shape)
    least = prior.kl(DiagonalGaussian(torch.zeros_like(nearest), nearest))
    assert least.sum().item() == pytest.approx(prior.committed_rate, rel=1e-9)


def test_the_least_rate_is_where_gradients_vanish():
    log_scale = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    prior = prior_of(0.8, (6,))
    optimizer = torch.optim.LBFGS([log_scale], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = prior.kl(DiagonalGaussian(torch.zeros_like(log_scale), log_scale)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(prior.committed_rate, rel=1e-9)


def test_samples_have_the_covariance():
    count = 100_000
    z = prior_of(0.6, (4,)).sample(count, torch.Generator().manual_seed(0)).double()
    found, expected = z.T @ z / count, dense_covariance(0.6, 4)
    error = ((1 + expected.square()) / count).sqrt()  # of a mean of products of correlated standard normals
    assert ((found - expected).abs() < 4 * error).all()
    assert prior_of(0.6, (2, 3, 4)).sample(5).shape == (5, 2, 3, 4)


@pytest.mark.parametrize("correlation", [-0.1, 1.0])
def test_correlations_that_are_none_are_refused(correlation: float):
    with pytest.raises(UserError, match="correlation="):
        AutoregressiveGaussianConfig(correlation=correlation)


@pytest.mark.parametrize("rate", [0.01, 2.0, 50.0, 5000.0])
@pytest.mark.parametrize("shape", [(10,), (2, 2, 3)])
def test_any_features_commit_at_least_the_rate(rate: float, shape: tuple[int, ...]):
    layer = CommittedRateLayer(CommittedRateConfig(rate=rate), shape)
    for spread in (0.0, 0.1, 10.0, 1000.0):
        features = spread * torch.randn(200, 2 * shape[0], *shape[1:], generator=torch.Generator().manual_seed(0))
        kl = layer(features).kl_to_standard_normal()
        assert (kl >= layer.share - 1e-6 * (1 + layer.share)).all(), spread


def test_the_rate_is_met_where_the_encoder_asks_for_no_mean():
    layer = CommittedRateLayer(CommittedRateConfig(rate=3.0), (6,))
    features = torch.cat([torch.zeros(9, 6), torch.linspace(-4, 4, 54).view(9, 6)], dim=1)
    posterior = layer(features)
    torch.testing.assert_close(posterior.kl_to_standard_normal(), torch.full((9, 6), 0.5))
    assert (posterior.scale.max() / posterior.scale.min()) > 3  # whichever the scale


def test_the_bounding_scales_have_the_rate_at_mean_zero():
    for share in (1e-3, 0.5, 20.0, 500.0):
        smallest, largest = bounding_log_scales(share)
        assert smallest < 0 < largest
        for log_scale in (smallest, largest):
            kl = 0.5 * (math.exp(2 * log_scale) - 1) - log_scale
            assert kl == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("rate", [0.05, 0.7, 3.0, 11.0, 60.0, 1000.0])
def test_a_committed_posterior_learns_from_any_features(rate: float):
    layer = CommittedRateLayer(CommittedRateConfig(rate=rate), (4,))
    features = torch.tensor([[0.0, -1e3, 1e3, 0.5, 0.0, 100.0, -100.0, -1e4]], requires_grad=True)
    posterior = layer(features)
    (posterior.kl_to_standard_normal().sum() + posterior.draw(torch.ones(1, 1, 4)).latents.sum()).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_a_committed_posterior_has_either_sign():
    layer = CommittedRateLayer(CommittedRateConfig(rate=3.0), (2,))
    mean = layer(torch.tensor([[-0.1, 0.1, 0.0, 0.0]])).mean
    assert mean[0, 0] == -mean[0, 1]
    assert mean[0, 1] > 0.1


def test_rates_that_are_none_are_refused():
    with pytest.raises(UserError, match="rate=0"):
        CommittedRateConfig(rate=0)
