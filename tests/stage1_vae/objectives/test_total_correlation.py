from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.networks.dense import DenseConfig, DenseLayers
from stage1_vae.objectives import BetaTCConfig, FactorConfig, ObjectiveOutput
from stage1_vae.objectives.adversarial import DiscriminatorConfig
from stage1_vae.objectives.terms import Terms, elbo
from stage1_vae.objectives.total_correlation import (
    kl_parts,
    log_sampling_weights,
    permuted,
    telling_loss,
    total_correlation,
)
from stage1_vae.posteriors import DiagonalGaussian
from stage1_vae.posteriors.full_covariance import FullCovariance
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.objectives.reference import GivenTerms, assert_same_with_gradient, facts, objective

B, D, N = 4, 2, 10


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    small = DenseConfig(hidden=(7,))
    return VAE(VAEConfig(latents=D, encoder=small, decoder=small), (3, 3))


def binary_images(count: int = 6) -> Tensor:
    return torch.randint(0, 2, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def normal(x: float, mean: float, log_scale: float) -> float:
    return math.exp(-0.5 * ((x - mean) / math.exp(log_scale)) ** 2) / (math.exp(log_scale) * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("sampling", ["stratified", "weighted"])
def test_beta_tc_and_its_gradient(sampling: str):
    generator = torch.Generator().manual_seed(0)
    mean, log_scale, noise, likelihood = (torch.randn(B, D, generator=generator).double() for _ in range(4))
    leaves = {"mean": mean.requires_grad_(), "log_scale": (0.3 * log_scale).requires_grad_()}
    leaves["log_likelihood"] = likelihood[None, :, 0].contiguous().requires_grad_()
    posterior = DiagonalGaussian(leaves["mean"], leaves["log_scale"])
    latents, log_posterior = posterior.draw(noise.unsqueeze(0))
    log_prior = -0.5 * latents.square() - 0.5 * math.log(2 * math.pi)
    terms = Terms(
        (latents,), leaves["log_likelihood"], (log_prior,), (log_posterior,), (None,), posteriors=(posterior,)
    )
    weights = np.full((B, B), 1 / (B * N))
    if sampling == "stratified":  # one image itself, two for two others, and one for the other seven
        for i in range(B):
            for m in range(B):
                weights[i, m] = {0: 1 / N, 1: (N - 3) / (N * 3)}.get((m - i) % B, 1 / 3)

    def reference(numbers: dict[str, np.ndarray]) -> float:
        mean, log_scale = numbers["mean"], numbers["log_scale"]
        z = mean + np.exp(log_scale) * noise.numpy()
        total = -numbers["log_likelihood"].mean()
        for i in range(B):
            given = [[normal(z[i, j], mean[m, j], log_scale[m, j]) for j in range(D)] for m in range(B)]
            q = math.log(sum(weights[i, m] * math.prod(given[m]) for m in range(B)))
            each = sum(math.log(sum(weights[i, m] * given[m][j] for m in range(B))) for j in range(D))
            prior = sum(math.log(normal(z[i, j], 0.0, 0.0)) for j in range(D))
            information = math.log(math.prod(given[i])) - q
            total += (1.5 * information + 4 * (q - each) + 0.5 * (each - prior)) / B
        return total

    one = objective("beta_tc", facts(images=N), alpha=1.5, beta=4.0, gamma=0.5, sampling=sampling)
    loss = one.loss(GivenTerms(terms), torch.zeros(B, 1, 2, 2), 0).loss
    assert_same_with_gradient(loss, leaves, reference)


def test_the_parts_add_up_to_the_kl(model: VAE):
    terms = model(binary_images())
    by_draws = terms._replace(exact_kl=(None,))
    for sampling in ("stratified", "weighted"):
        parts = kl_parts(terms, log_sampling_weights(sampling, 6, 50))
        torch.testing.assert_close(sum(parts), terms.log_likelihood.mean() - elbo(by_draws).mean())


def test_stratified_sampling_is_unbiased():
    """The mean over all batches that hold an image, in any order, is q(z) itself."""
    generator = torch.Generator().manual_seed(0)
    images, batch, image = 6, 4, 2
    densities = torch.rand(images, generator=generator, dtype=torch.float64)  # q(z|x_m) of one z
    weights = log_sampling_weights("stratified", batch, images).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(batch).double())
    others = [other for other in range(images) if other != image]
    for row in range(batch):
        found = []
        for chosen in itertools.permutations(others, batch - 1):
            members = [*chosen[:row], image, *chosen[row:]]
            found.append(weights[row] @ densities[members])
        torch.testing.assert_close(torch.stack(found).mean(), densities.mean())


def test_weights_of_a_batch_as_large_as_the_set_are_all_right():
    for images in (1, 3, 5):
        weights = log_sampling_weights("stratified", 5, images)
        assert weights.isfinite().all()
        torch.testing.assert_close(weights.exp().sum(1), torch.ones(5).double())


def test_a_posterior_whose_numbers_have_no_densities_is_refused(model: VAE):
    class Bound(DiagonalGaussian):
        def log_marginals(self, latents: Tensor) -> None:
            return None

    terms = model(binary_images())._replace(posteriors=(Bound(torch.zeros(6, D), torch.zeros(6, D)),))
    with pytest.raises(UserError, match="beta_tc with a posterior of Bound, expected one whose single numbers"):
        kl_parts(terms, log_sampling_weights("weighted", 6, 50))


def test_numbers_that_depend_on_each_other_count_alone_by_their_marginals():
    """One image: the total correlation is that of its own posterior, -log(1 - rho^2) / 2 for two correlated numbers."""
    torch.manual_seed(0)
    rho, count = 0.8, 400
    lower = torch.tensor([[0.0, 0.0], [rho, 0.0]]).expand(count, 2, 2)
    log_scale = torch.tensor([0.0, 0.5 * math.log(1 - rho**2)]).expand(count, 2)
    posterior = FullCovariance(torch.zeros(count, 2), log_scale, lower)
    latents, log_posterior = posterior.draw(posterior.noise(1))
    terms = Terms((latents,), torch.zeros(1, count), (log_posterior,), (log_posterior,), (None,), (posterior,))
    parts = kl_parts(terms, log_sampling_weights("weighted", count, 1))  # of equal posteriors, q(z) is each of them
    log_odds = log_posterior[0].sum(-1) - posterior.log_marginals(latents)[0].sum(-1)
    torch.testing.assert_close(parts.total_correlation, log_odds.mean())
    error = log_odds.std() / math.sqrt(count)
    assert abs(parts.total_correlation + 0.5 * math.log(1 - rho**2)) < 4 * error


# ---- FactorVAE ------------------------------------------------------------------------------------------------------

SMALL = DiscriminatorConfig(network=DenseConfig(hidden=(8,)))


def output_of(model: VAE, **settings: Any) -> ObjectiveOutput:
    torch.manual_seed(4)
    one = objective("factor", facts(latent_shape=(D,)), **{"discriminator": SMALL} | settings)
    torch.manual_seed(3)
    return one.loss(model, binary_images(), 0)


def test_factor_adds_the_log_odds_to_the_bound(model: VAE):
    torch.manual_seed(4)
    one = objective("factor", facts(latent_shape=(D,)), gamma=2.5, discriminator=SMALL)
    network = one.companions["discriminator"].module
    noise = torch.randn(1, 6, D)
    output = one.loss(model, binary_images(), 0, noise)
    terms = model(binary_images(), noise=noise)
    odds = [row[0] - row[1] for row in network(terms.latents[0][0]).tolist()]
    assert output.metrics["total_correlation"].item() == pytest.approx(sum(odds) / 6, rel=1e-5)
    logits = network(terms.latents[0][0])
    slow = -elbo(terms).mean() + 2.5 * (logits[:, 0] - logits[:, 1]).mean()
    torch.testing.assert_close(output.loss, slow)
    weights = list(model.parameters())
    gradients = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (output.loss, slow))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    own = output.companion_losses["discriminator"]
    for loss, others in ((output.loss, network), (own, model)):
        left = torch.autograd.grad(loss, list(others.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in left)


def test_what_is_permuted_keeps_each_numbers_values():
    torch.manual_seed(0)
    latents = torch.arange(40.0).view(20, 2)
    mixed = permuted(latents)
    assert all(sorted(mixed[:, j].tolist()) == latents[:, j].tolist() for j in range(2))
    assert (mixed[:, 1] - mixed[:, 0] != 1).sum() > 10  # each by itself


def test_the_discriminator_finds_the_total_correlation_of_a_gaussian():
    torch.manual_seed(0)
    rho = 0.8
    network = DenseLayers(2, 2, DenseConfig(hidden=(32,), activation="leaky_relu"))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    first, second = torch.randn(2, 2, 8192)
    latents = torch.stack([first, rho * first + math.sqrt(1 - rho**2) * second], dim=-1)  # 2 8192 2
    for _ in range(300):
        places = torch.randint(0, 8192, (512,))
        loss = telling_loss(network(latents[0][places]), network(permuted(latents[1][places])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < math.log(2) - 0.05
    assert total_correlation(network(latents[0])).item() == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.12)


CHANGES: dict[str, dict[str, Any]] = {
    "beta_tc": {"alpha": 2.0, "beta": 2.0, "gamma": 2.0, "sampling": "weighted"},
    "factor": {"draws": 3, "gamma": 2.0, "discriminator": DiscriminatorConfig(network=DenseConfig(hidden=(5,)))},
}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in CHANGES.items() for field in fields])
def test_every_field_changes_the_loss(model: VAE, kind: str, field: str):
    found = []
    beside = {"discriminator": SMALL} if kind == "factor" else {}
    for settings in (beside, beside | {field: CHANGES[kind][field]}):
        torch.manual_seed(4)
        one = objective(kind, facts(latent_shape=(D,)), **settings)
        torch.manual_seed(3)
        found.append(one.loss(model, binary_images(), 0).loss)
    assert not torch.isclose(*found)


def test_the_table_of_changes_names_every_field():
    for config in (BetaTCConfig, FactorConfig):
        fields = set(config.__dataclass_fields__)
        assert set(CHANGES[config().kind]) == fields - {"kind"}


def test_few_images_and_weights_below_0_are_refused(model: VAE):
    with pytest.raises(UserError, match="fewer than 4 images"):
        objective("factor", facts(latent_shape=(D,)), discriminator=SMALL).loss(model, binary_images(3), 0)
    with pytest.raises(UserError, match=r"beta=-1\.0, expected 0 or more"):
        BetaTCConfig(beta=-1.0)
    with pytest.raises(UserError, match=r"gamma=0\.0, expected above 0"):
        FactorConfig(gamma=0.0)
