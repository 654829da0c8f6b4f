"""Priors of clusters, what they start from, and how clusters are held against classes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.clustering import agreement, cluster_probabilities
from stage1_vae.likelihoods import BernoulliConfig, GaussianConfig
from stage1_vae.networks import DenseConfig
from stage1_vae.objectives import AutoencoderConfig
from stage1_vae.objectives.terms import elbo
from stage1_vae.posteriors import DiagonalGaussianConfig
from stage1_vae.priors.clusters import Clusters, ClustersConfig, GaussianMixture, GaussianMixtureConfig
from stage1_vae.start import take_networks
from stage1_vae.train import train_vae
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.test_train import config, images

__all__ = ["images"]  # a fixture

KINDS = {"gaussian_mixture": GaussianMixtureConfig(clusters=3), "clusters": ClustersConfig(clusters=3, hidden=(64,))}


def mixture(scale: float = 0.7) -> GaussianMixture:
    torch.manual_seed(0)
    prior = GaussianMixture(GaussianMixtureConfig(clusters=3), (2,))
    prior.logits.data = torch.tensor([0.3, -1.0, 0.5])
    prior.log_scales.data = math.log(scale) + 0.3 * torch.randn(3, 2)
    return prior


def by_hand(prior: GaussianMixture, z: Tensor) -> Tensor:
    weights = prior.logits.softmax(0)
    joint = [
        weights[y] * torch.distributions.Normal(prior.means[y], prior.log_scales[y].exp()).log_prob(z).sum(-1).exp()
        for y in range(3)
    ]
    return torch.stack(joint, -1)


def test_the_mixture_s_density_and_its_clusters_follow_bayes_rule():
    prior, z = mixture(), torch.randn(4, 5, 2)
    expected = by_hand(prior, z)
    torch.testing.assert_close(prior.log_density(z), expected.sum(-1, keepdim=True).log())
    told = prior.cluster_log_probabilities(z[0]).exp()
    torch.testing.assert_close(told, expected[0] / expected[0].sum(-1, keepdim=True))


def test_scales_at_their_floor_can_leave_it_and_not_sink():
    prior = GaussianMixture(GaussianMixtureConfig(clusters=2, smallest_scale=0.01), (2,))
    prior.means.data.zero_()
    prior.log_scales.data = torch.tensor([[0.0099, 0.002], [1, 0.02]]).log()
    torch.testing.assert_close(prior.mixture().factors.detach(), torch.tensor([[0.01, 0.01], [1, 0.02]]))

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(-prior.log_density(z).sum(), prior.log_scales)[0][0]

    assert (gradient(torch.full((1, 1, 2), 0.02)) < 0).all()  # wider scales are more likely
    assert torch.equal(gradient(torch.zeros(1, 1, 2)), torch.zeros(2))  # narrower ones: none
    optimizer = torch.optim.Adam([prior.log_scales], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (-prior.log_density(0.03 * torch.randn(1, 64, 2)).mean()).backward()
        optimizer.step()
    assert prior.mixture().factors.min() > 0.02


def test_samples_of_clusters_have_their_moments():
    prior = mixture()
    drawn = prior.sample_of(torch.ones(40_000, dtype=torch.int64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), prior.means[1], atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0), prior.log_scales[1].exp(), atol=0.02, rtol=0)
    near = (torch.cdist(prior.sample(20_000, torch.Generator().manual_seed(0)), prior.means.detach())).argmin(1)
    assert near.bincount(minlength=3).float().argmax() == prior.logits.argmax()


def test_the_network_s_bound_is_below_the_density_and_reaches_it_where_the_network_is_right(
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(0)
    prior, z = Clusters(KINDS["clusters"], (2,)), torch.randn(1, 6, 2)  # type: ignore[arg-type]
    joint = prior.log_densities(z[0]) - math.log(3)
    exact = joint.logsumexp(1)
    assert (prior.log_density(z)[0, :, 0] < exact).all()
    torch.testing.assert_close(prior.eval().log_density(z)[0, :, 0], exact)
    prior.train()
    monkeypatch.setattr(prior, "cluster_log_probabilities", lambda _: joint.log_softmax(1))
    torch.testing.assert_close(prior.log_density(z)[0, :, 0], exact)


def test_what_is_judged_is_the_density_that_is_sampled():
    """By the share of draws in a small square, not by the formula."""
    torch.manual_seed(0)
    prior = Clusters(KINDS["clusters"], (2,)).eval()  # type: ignore[arg-type]
    drawn = prior.sample(200_000, torch.Generator().manual_seed(0))
    share = float((drawn.abs() < 0.3).all(1).float().mean()) / 0.6**2
    axis = torch.linspace(-0.3, 0.3, 21)
    density = prior.log_density(torch.cartesian_prod(axis, axis)[None]).exp().mean().detach()
    assert float(density) == pytest.approx(share, rel=0.03)


def test_the_loss_and_its_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    network = DenseConfig(hidden=(6,))
    model = VAE(VAEConfig(latents=2, encoder=network, decoder=network, prior=KINDS["clusters"]), (4, 4))
    pictures = torch.randint(0, 2, (3, 1, 4, 4)) * 2.0 - 1
    noise = torch.randn(1, 3, 2)
    prior: Clusters = model.prior
    ours = -elbo(model(pictures, noise=noise)).mean()
    posterior = model.posterior(pictures)
    z = posterior.draw(noise).latents[0]
    told = prior.classifier(z).softmax(1)  # p(y|z)
    log_q = torch.distributions.Normal(posterior.mean, posterior.scale).log_prob(z).sum(1, keepdim=True)  # type: ignore[attr-defined]
    of_clusters = torch.distributions.Normal(prior.means, 1.0).log_prob(z[:, None]).sum(-1)  # q(z|y)
    apart = (told * (log_q - of_clusters)).sum(1)
    even = (told * (told.log() - math.log(1 / 3))).sum(1)  # KL(p(y|z) || q(y))
    formula = (apart + even - model.decoder.log_likelihood(z[None], pictures)[0]).mean()
    torch.testing.assert_close(ours, formula)
    weights = list(model.parameters())
    for one, other in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(formula, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_a_mixture_of_what_the_encoder_tells(kind: str):
    """Images of three kinds, and an encoder that sees the kind: each cluster starts in the middle of one."""
    torch.manual_seed(1)
    model = VAE(VAEConfig(latents=2, encoder=DenseConfig(hidden=()), prior=KINDS[kind]), (4, 4))
    pictures = torch.full((90, 1, 4, 4), -1.0) + 0.05 * torch.rand(90, 1, 4, 4)
    for place in range(90):
        pictures[place, 0, place % 3] += 1.9
    model.start(pictures)
    means = model.encode(pictures).detach()
    centres = torch.stack([means[kind::3].mean(0) for kind in range(3)])
    assert torch.cdist(centres, model.prior.means.detach()).min(1).values.max() < 0.01
    told = cluster_probabilities(model, pictures)
    assert agreement(told.argmax(1).numpy(), np.arange(90) % 3, 3).accuracy == 1
    assert told.max(1).values.mean() > 0.9
    with pytest.raises(UserError, match=r"clusters=3 for 2 training images"):
        model.start(pictures[:2])


def test_a_run_takes_the_networks_of_another(images: Path, tmp_path: Path):
    before = replace(config(images), objective=AutoencoderConfig())
    train_vae(before, tmp_path / "autoencoder")
    clustered = replace(before.model, prior=GaussianMixtureConfig(clusters=2))
    asked = replace(config(images), model=clustered, start_from=str(tmp_path / "autoencoder"))
    train_vae(replace(asked, train=replace(asked.train, learning_rate=1e-12)), tmp_path / "run")
    first, second = (VAE.from_pretrained(tmp_path / name).encoder.state_dict() for name in ("autoencoder", "run"))
    torch.testing.assert_close(first, second)
    other = VAE(VAEConfig(latents=3, encoder=before.model.encoder, decoder=before.model.decoder), (8, 8))
    with pytest.raises(UserError, match=r"model\.latents=2, expected 3.*give both trainings the same networks"):
        take_networks(other, tmp_path / "autoencoder")


def test_networks_are_taken_only_where_they_compute_the_same(tmp_path: Path):
    """Where all weights have the same shapes, too."""
    given = VAEConfig(latents=2, encoder=DenseConfig(hidden=(4,)), decoder=DenseConfig(hidden=(4,), activation="tanh"))
    first = VAE(replace(given, likelihood=GaussianConfig(scale=0.5)), (4, 4))
    first.save_pretrained(tmp_path / "first")
    wider = VAE(replace(given, likelihood=GaussianConfig(scale=2.0), prior=GaussianMixtureConfig(clusters=2)), (4, 4))
    take_networks(wider, tmp_path / "first")
    pictures = torch.rand(2, 1, 4, 4)
    assert torch.equal(wider.decode(wider.encode(pictures)), first.decode(first.encode(pictures)))
    for name, other in (
        ("encoder.activation", {"encoder": replace(given.encoder, activation="elu")}),
        ("posterior.scale", {"posterior": DiagonalGaussianConfig(scale="softplus")}),
        ("decoder.activation", {"decoder": DenseConfig(hidden=(4,))}),
        ("likelihood.kind", {"likelihood": BernoulliConfig()}),
    ):
        model = VAE(replace(given, **{"likelihood": GaussianConfig(), **other}), (4, 4))
        with pytest.raises(UserError, match=rf"first has model\.{name}="):
            take_networks(model, tmp_path / "first")
    with pytest.raises(UserError, match="of images of 4x4 pixels, expected 4x6"):
        take_networks(VAE(replace(given, likelihood=GaussianConfig()), (4, 6)), tmp_path / "first")


def test_agreement_is_that_of_the_best_of_all_matchings():
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 4, 200)
    clusters = np.where(chance.random(200) < 0.6, (labels + 1) % 4, chance.integers(0, 5, 200))
    matchings = np.array(list(itertools.permutations([0, 1, 2, 3, -1])))  # the class of each cluster
    best = (matchings[:, clusters] == labels).mean(axis=1).max()
    found = agreement(clusters, labels, 5)
    assert found.accuracy == pytest.approx(best)
    assert found.matched[1] == 0
    counted = [np.bincount(labels[clusters == cluster]).max() for cluster in range(5) if (clusters == cluster).any()]
    assert found.purity == pytest.approx(sum(counted) / 200)
    assert found.purity >= found.accuracy
