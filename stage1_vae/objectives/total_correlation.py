"""Objectives that press the numbers of the latents to be independent of each other.

Their total correlation is TC = KL(q(z) || prod_j q(z_j)), q(z) = E_p(x)[q(z|x)]. The KL term of the bound parts into

    KL(q(z|x) || p(z)) = I(z; x) + TC + sum_j KL(q(z_j) || p(z_j)),  means over images

which beta-TC-VAE (Chen et al. 2018, arXiv:1802.04942, equation 4) weighs by alpha, beta and gamma, estimating q(z) from
the posteriors of a batch. FactorVAE (Kim and Mnih 2018, arXiv:1802.05983, equation 2) adds gamma TC to the bound, which
a discriminator estimates that tells latents from latents whose numbers come from different images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError, check_fields
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives.adversarial import COMPANION, DiscriminatorConfig, frozen
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import elbo_figures
from stage1_vae.objectives.terms import Terms, total_kl
from stage1_vae.posteriors.base import Posterior

Sampling = Literal["stratified", "weighted"]


# ---- beta-TC-VAE ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BetaTCConfig:
    """The three parts of the KL term have a weight each; all 1 is the ELBO."""

    kind: Literal["beta_tc"] = "beta_tc"
    alpha: float = 1.0  # of the mutual information of latents and images
    beta: float = 6.0  # of the total correlation
    gamma: float = 1.0  # of what each number's distribution differs from the prior's
    sampling: Sampling = "stratified"  # of q(z) from a minibatch

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("alpha", self.alpha >= 0, "0 or more"),
                ("beta", self.beta >= 0, "0 or more"),
                ("gamma", self.gamma >= 0, "0 or more"),
                ("sampling", self.sampling in ("stratified", "weighted"), "stratified or weighted"),
            ],
        )


class BetaTC(Objective):
    config: BetaTCConfig

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        config = self.config
        terms: Terms = model(images, 1, noise)
        weights = log_sampling_weights(config.sampling, len(images), self.facts.images)
        parts = kl_parts(terms, weights)
        kl = config.alpha * parts.mutual_information + config.beta * parts.total_correlation
        loss = kl + config.gamma * parts.of_each_number - terms.log_likelihood.mean()
        figures = {name: value.detach() for name, value in parts._asdict().items()}
        return ObjectiveOutput(loss, {**elbo_figures(terms), **figures})


class KLParts(NamedTuple):
    """Of the KL term, means over images: they add up to it, estimated from draws. Scalars."""

    mutual_information: Tensor
    total_correlation: Tensor
    of_each_number: Tensor


def kl_parts(terms: Terms, log_weights: Tensor) -> KLParts:
    """terms: of one draw; log_weights: b b, as `log_sampling_weights` gives them."""
    together, alone = pair_densities(terms.posteriors[0], terms.latents[0][0])
    log_weights = log_weights.to(together)
    of_latents = (together + log_weights).logsumexp(dim=1)  # b: log q(z)
    of_numbers = (alone + log_weights.unsqueeze(-1)).logsumexp(dim=1).sum(-1)  # b: sum_j log q(z_j)
    log_posterior, log_prior = terms.log_posterior[0][0].sum(-1), terms.log_prior[0][0].sum(-1)
    return KLParts(
        (log_posterior - of_latents).mean(), (of_latents - of_numbers).mean(), (of_numbers - log_prior).mean()
    )


def pair_densities(posterior: Posterior, latents: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z of image i | image m), b b, and of its numbers alone, b b d: of latents b d of image i by the posterior
    of image m. Raises UserError for a posterior whose numbers have no densities of their own in closed form."""
    pairs = latents.unsqueeze(1).expand(-1, len(latents), *latents.shape[1:])
    alone = posterior.log_marginals(pairs)
    if alone is None:
        raise UserError(
            f"objective.kind=beta_tc with a posterior of {type(posterior).__name__}, expected one whose single numbers "
            "have densities in closed form: give --model.posterior.kind diagonal or full_covariance"
        )
    return posterior.log_density(pairs).sum(-1), alone


def log_sampling_weights(sampling: Sampling, batch: int, images: int) -> Tensor:
    """Log weights w_im, b b, of which q(z_i) = sum_m w_im q(z_i|x_m), z_i a draw of image i, for a batch of a set of so
    many images (Chen et al. 2018, appendix C). Minibatch weighted sampling has 1 / (b images) for all. Stratified
    sampling, which is unbiased of q(z), has 1 / images for image i itself, and lets the others stand for the rest of
    the set: 1 / (b - 1) each, but for one of them, which evens the sum out to 1."""
    if sampling == "weighted" or batch == 1:
        return torch.full((batch, batch), -math.log(batch * images), dtype=torch.float64)
    others = batch - 1
    images = max(images, batch)
    weights = torch.full((batch, batch), 1 / others, dtype=torch.float64)
    places = torch.arange(batch)
    weights[places, places] = 1 / images
    weights[places, (places + 1) % batch] = (images - others) / (images * others)
    return weights.log()


# ---- FactorVAE ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """The bound, less gamma TC."""

    kind: Literal["factor"] = "factor"
    draws: int = 1  # of the latents of each image
    gamma: float = 10.0  # of the total correlation, as the discriminator sees it
    discriminator: DiscriminatorConfig = field(
        default_factory=lambda: DiscriminatorConfig(
            network=DenseConfig(hidden=(1000,) * 5, activation="leaky_relu"), learning_rate=1e-4, betas=(0.5, 0.9)
        )
    )

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("gamma", self.gamma > 0, "above 0; objective.kind=elbo has no discriminator"),
            ],
        )


class Factor(Objective):
    """The discriminator sees latents of one half of the batch, and of the other half with their numbers permuted."""

    config: FactorConfig

    def __init__(self, config: FactorConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        self.companions = {COMPANION: config.discriminator.build(math.prod(facts.latent_shape), 2)}

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        if len(images) < 4:
            raise UserError("latents of fewer than 4 images cannot be permuted: give more to a micro-batch")
        discriminator = self.companions[COMPANION].module
        terms: Terms = model(images, self.config.draws, noise)
        latents = terms.latents[0].flatten(0, 1).flatten(1)  # k b, d
        with frozen(discriminator):
            correlation = total_correlation(discriminator(latents).float())
        joint, others = terms.latents[0][0].detach().flatten(1).chunk(2)
        own = telling_loss(discriminator(joint).float(), discriminator(permuted(others)).float())
        loss = total_kl(terms).mean() + self.config.gamma * correlation - terms.log_likelihood.mean()
        figures = {"total_correlation": correlation.detach(), "discriminator_loss": own.detach()}
        return ObjectiveOutput(loss, {**elbo_figures(terms), **figures}, {COMPANION: own})


def total_correlation(logits: Tensor) -> Tensor:
    """The discriminator's estimate from its logits of latents, n 2 (jointly drawn, permuted): the mean of the log odds,
    a scalar in nats."""
    return (logits[:, 0] - logits[:, 1]).mean()


def telling_loss(joint: Tensor, permuted: Tensor) -> Tensor:
    """Half the cross-entropies of telling both, given logits n 2, a scalar: at best 0, and log 2 by chance."""
    return -0.5 * (joint.log_softmax(dim=1)[:, 0].mean() + permuted.log_softmax(dim=1)[:, 1].mean())


def permuted(latents: Tensor) -> Tensor:
    """Each number of the latents, n d, permuted over images by itself."""
    orders = torch.rand(latents.shape, device=latents.device).argsort(dim=0)
    return latents.gather(0, orders)
