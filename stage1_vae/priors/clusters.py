"""Priors that sort latents into K clusters: p(z) = sum_y p(y) p(z|y), each p(z|y) a Gaussian of independent numbers.

    gaussian_mixture   weights, means and scales are learned, and p(y|z) follows by Bayes' rule: VaDE (Jiang et al.
                       2017, "Variational Deep Embedding", arXiv:1611.05148). Its ELBO, whose q(y|x) is the best there
                       is, is the ELBO under the mixture.
    clusters           means alone are learned, p(y) is uniform, scales are 1, and a network says p(y|z). With it

        log p(z) >= sum_y p(y|z) (log p(z|y) + log p(y) - log p(y|z))

                       stands for log p(z) in training: the loss is

        -log p(x|z) + sum_y p(y|z) log(q(z|x) / p(z|y)) + KL(p(y|z) || p(y))

                       (Su 2018, "A clustering VAE"). The network may be wrong, which costs as much as it is wrong, and
                       it sorts images without the means. What is judged is log p(z) itself, of which samples are.

Both start from a mixture fitted to the posterior means of training images, by expectation maximisation: worth the name
where the encoder has learned something before, `start_from` an autoencoder. The network starts from what that mixture
says of the same means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, check_fields
from common.expectation_maximisation import Mixture, fit_mixture
from stage1_vae.networks.dense import DenseConfig, DenseLayers
from stage1_vae.posteriors.base import LatentShape, Posterior
from stage1_vae.posteriors.diagonal import HALF_LOG_TWO_PI
from stage1_vae.priors.base import LatentPrior

AT_ONCE = 500  # images that are encoded at a time before the first step
KMEANS = 10  # iterations before expectation maximisation
START_STEPS, START_RATE = 50, 1e-2  # of Adam, for the network that says p(y|z), before the first step


@dataclass(frozen=True, kw_only=True)
class GaussianMixtureConfig:
    """p(z) = sum_y weight_y N(mean_y, diag(scale_y^2)), all of it learned (VaDE)."""

    kind: Literal["gaussian_mixture"] = "gaussian_mixture"
    clusters: int = 10  # K
    smallest_scale: float = 0.01  # of each number of a cluster
    start_images: int = 10_000  # training images, at most, to which a mixture is fitted before the first step
    start_iterations: int = 50  # of expectation maximisation, after k-means; 0: k-means alone
    start_tries: int = 3  # of which the most likely mixture is taken

    def __post_init__(self) -> None:
        check_fields(
            self,
            [*start_checks(self), ("smallest_scale", self.smallest_scale > 0, "above 0")],
        )


@dataclass(frozen=True, kw_only=True)
class ClustersConfig:
    """p(z) = 1/K sum_y N(mean_y, I), whose means are learned, and a network that says p(y|z)."""

    kind: Literal["clusters"] = "clusters"
    clusters: int = 10  # K
    hidden: tuple[int, ...] = (256,)  # units of the hidden layers of the network that says p(y|z)
    start_images: int = 10_000  # training images, at most, to which a mixture is fitted before the first step
    start_iterations: int = 50  # of expectation maximisation, after k-means; 0: k-means alone
    start_tries: int = 3  # of which the most likely mixture is taken

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_fields(
            self, [*start_checks(self), ("hidden", all(units >= 1 for units in self.hidden), "units, or none")]
        )


def start_checks(config: GaussianMixtureConfig | ClustersConfig) -> list[tuple[str, bool, str]]:
    return [
        ("clusters", config.clusters >= 1, "at least 1"),
        ("start_images", config.start_images >= config.clusters, "at least as many as clusters"),
        ("start_iterations", config.start_iterations >= 0, "0 or more"),
        ("start_tries", config.start_tries >= 1, "at least 1"),
    ]


class ClusteredPrior(LatentPrior):
    """What both have: K means, and the start. KL is estimated from draws."""

    config: GaussianMixtureConfig | ClustersConfig

    def __init__(self, config: GaussianMixtureConfig | ClustersConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.means = nn.Parameter(torch.randn(config.clusters, math.prod(shape)))
        self.posterior: Callable[[Tensor], Posterior] | None = None

    def bind(self, image_shape: tuple[int, int, int], posterior: Callable[[Tensor], Posterior]) -> None:
        self.posterior = posterior  # no module: its parameters are the model's, not the prior's too

    @property
    def start_images(self) -> int:
        return self.config.start_images

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Takes over the mixture that fits the posterior means of these images best, b c H W. Raises UserError for
        fewer images than clusters."""
        config = self.config
        if len(images) < config.clusters:
            raise UserError(
                f"model.prior.clusters={config.clusters} for {len(images)} training images, expected at most as many; "
                "give fewer clusters"
            )
        assert self.posterior is not None, "a prior is a part of a VAE, which binds it to its posterior"
        means = torch.cat([self.posterior(part).mean.flatten(1) for part in images.split(AT_ONCE)])
        fits = [
            fit_mixture(means, config.clusters, "diagonal", config.start_iterations, self.smallest_start_scale, KMEANS)
            for _ in range(config.start_tries)
        ]
        self.take(max(fits, key=lambda fit: fit[1][-1])[0], means)

    smallest_start_scale: float

    def take(self, mixture: Mixture, latents: Tensor) -> None:
        """The mixture that training starts from, and the latents that it was fitted to, n d."""
        raise NotImplementedError

    def cluster_log_probabilities(self, latents: Tensor) -> Tensor:
        """log p(y|z): n *shape -> n K."""
        raise NotImplementedError

    def sample_of(self, clusters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws of p(z|y) for the clusters y, n -> n *shape."""
        raise NotImplementedError


class Floor(torch.autograd.Function):
    """max(x, smallest), any shape, whose gradient reaches what is below too where descent raises it: nothing stays at
    the floor for ever, as it would by `clamp`, and nothing sinks below it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, smallest: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.smallest = smallest
        return x.clamp(min=smallest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient.where((x >= ctx.smallest) | (gradient < 0), 0.0), None


class GaussianMixture(ClusteredPrior):
    config: GaussianMixtureConfig

    def __init__(self, config: GaussianMixtureConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.smallest_start_scale = config.smallest_scale
        self.logits = nn.Parameter(torch.zeros(config.clusters))
        self.log_scales = nn.Parameter(torch.zeros_like(self.means))

    def take(self, mixture: Mixture, latents: Tensor) -> None:
        self.logits.copy_(mixture.log_weights)
        self.means.copy_(mixture.means)
        self.log_scales.copy_(mixture.factors.log())

    def mixture(self) -> Mixture:
        scales: Tensor = Floor.apply(self.log_scales.exp(), self.config.smallest_scale)
        return Mixture(self.logits.log_softmax(0), self.means, scales)

    def log_joint(self, latents: Tensor) -> Tensor:
        """log p(z, y): n *shape -> n K."""
        return self.mixture().log_densities(latents.flatten(1))

    def log_density(self, latents: Tensor) -> Tensor:
        return self.log_joint(latents.flatten(0, 1)).logsumexp(1, keepdim=True).unflatten(0, latents.shape[:2])

    def cluster_log_probabilities(self, latents: Tensor) -> Tensor:
        return self.log_joint(latents).log_softmax(1)

    @torch.no_grad()
    def sample_of(self, clusters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _, means, scales = self.mixture()
        noise = torch.randn(len(clusters), means.shape[1], device=means.device, generator=generator)
        return (means[clusters] + scales[clusters] * noise).unflatten(1, self.shape)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        weights = self.logits.softmax(0)
        return self.sample_of(torch.multinomial(weights, count, replacement=True, generator=generator), generator)


class Clusters(ClusteredPrior):
    config: ClustersConfig
    smallest_start_scale = 0.01

    def __init__(self, config: ClustersConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.classifier = DenseLayers(math.prod(shape), config.clusters, DenseConfig(hidden=config.hidden))

    def take(self, mixture: Mixture, latents: Tensor) -> None:
        self.means.copy_(mixture.means)
        told = torch.cat([mixture.log_densities(part.double()).softmax(1) for part in latents.split(AT_ONCE)])
        self.fit_classifier(latents, told.to(latents.dtype))

    @torch.enable_grad()
    def fit_classifier(self, latents: Tensor, told: Tensor) -> None:
        """Makes the network say of latents, n d, which cluster they belong to, n K, by their cross-entropy.

        It learns from latents around 0, of about 1, whatever the encoder's are, and its first layer takes that over.
        One scale is that of all numbers: those that say nothing, which vary little, stay small.
        """
        centre = latents.mean(0)
        scale = (latents - centre).square().mean().sqrt().clamp(min=1e-3)
        standardised = (latents - centre) / scale
        optimizer = torch.optim.Adam(self.classifier.parameters(), lr=START_RATE)
        for _ in range(START_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(self.classifier(standardised), told).backward()
            optimizer.step()
        optimizer.zero_grad()
        first = self.classifier.layers[0]
        assert isinstance(first, nn.Linear)
        with torch.no_grad():
            first.weight.div_(scale)
            first.bias.sub_(first.weight @ centre)

    def log_densities(self, latents: Tensor) -> Tensor:
        """log p(z|y): n d -> n K."""
        squares = (latents.unsqueeze(1) - self.means).square().sum(-1)
        return -0.5 * squares - HALF_LOG_TWO_PI * latents.shape[1]

    def log_density(self, latents: Tensor) -> Tensor:
        """n of one term: in training the bound of log p(z), by which the network learns, else log p(z)."""
        flat = latents.flatten(0, 1).flatten(1)
        log_joint = self.log_densities(flat) - math.log(self.config.clusters)
        if self.training:
            log_told = self.cluster_log_probabilities(flat)
            found = (log_told.exp() * (log_joint - log_told)).sum(1, keepdim=True)
        else:
            found = log_joint.logsumexp(1, keepdim=True)
        return found.unflatten(0, latents.shape[:2])

    def cluster_log_probabilities(self, latents: Tensor) -> Tensor:
        return F.log_softmax(self.classifier(latents.flatten(1)), dim=1)

    @torch.no_grad()
    def sample_of(self, clusters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(len(clusters), self.means.shape[1], device=self.means.device, generator=generator)
        return (self.means[clusters] + noise).unflatten(1, self.shape)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        chosen = torch.randint(self.config.clusters, (count,), device=self.means.device, generator=generator)
        return self.sample_of(chosen, generator)
