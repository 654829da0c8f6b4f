"""Objectives that look at the latents of a batch together, through their maximum mean discrepancy to the prior.

InfoVAE (Zhao et al. 2017, arXiv:1706.02262, equation 6) weighs what the bound has as one,

    loss = -E_q[log p(x|z)] + (1 - alpha) KL(q(z|x) || p(z)) + (alpha + lambda - 1) MMD(q(z), p(z))

and has as special cases the ELBO (alpha=0, lambda=1), MMD-VAE (alpha=1) and, of the posterior's mean alone, the
Wasserstein autoencoder (Tolstikhin et al. 2017, arXiv:1711.01558: alpha=1, deterministic=true, weight lambda).
A deterministic autoencoder, the baseline, has neither of the two terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError, check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import elbo_figures
from stage1_vae.objectives.terms import Terms, total_kl

Kernel = Literal["rbf", "imq"]


@dataclass(frozen=True, kw_only=True)
class InfoVAEConfig:
    """The rest of the bound's KL term goes to the discrepancy between the aggregated posterior and the prior."""

    kind: Literal["info"] = "info"
    draws: int = 1  # of the latents of each image; the discrepancy is of all of them
    alpha: float = 1.0  # the KL's weight is 1 - alpha
    discrepancy_weight: float = 10.0  # lambda: the discrepancy's weight is alpha + lambda - 1
    kernel: Kernel = "imq"  # inverse multi-quadratic, whose tails are heavy, or of radial basis functions
    bandwidth: float = 1.0  # of the kernel, as a share of the distance at which N(0, I) has its pairs, sqrt(2 d)
    scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of kernel=imq: its sum goes over these factors
    deterministic: bool = False  # latents are the means of their posteriors, not draws

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        positive = bool(self.scales) and all(scale > 0 for scale in self.scales)
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("draws", self.draws == 1 or not self.deterministic, "1 beside deterministic=true"),
                ("alpha", self.alpha <= 1, "at most 1, where the KL has no weight"),
                ("alpha", self.alpha == 1 or not self.deterministic, "1 beside deterministic=true: a mean has no KL"),
                ("discrepancy_weight", self.discrepancy_weight + self.alpha >= 1, "at least 1 - alpha"),
                ("kernel", self.kernel in ("rbf", "imq"), "rbf or imq"),
                ("bandwidth", self.bandwidth > 0, "above 0"),
                ("scales", positive, "one factor or more, all above 0"),
            ],
        )


class InfoVAE(Objective):
    config: InfoVAEConfig

    def __init__(self, config: InfoVAEConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        self.deterministic = config.deterministic
        if config.deterministic:
            self.best_metric = "negative_log_likelihood"

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        config = self.config
        terms: Terms = model(images, 0 if config.deterministic else config.draws, noise)
        latents = terms.latents[0].flatten(0, 1).flatten(1).float()  # k b, d
        if len(latents) < 2:
            raise UserError("there is no discrepancy of one latent: give 2 images or more to a micro-batch")
        prior = terms.priors[0].sample(len(latents)).flatten(1).detach()
        discrepancy = mmd(latents, prior, config.kernel, config.bandwidth, config.scales)
        loss = (config.alpha + config.discrepancy_weight - 1) * discrepancy - terms.log_likelihood.mean()
        if config.alpha != 1:
            loss = loss + (1 - config.alpha) * total_kl(terms).mean()
        figures = likelihood_figures(terms) if config.deterministic else elbo_figures(terms)
        return ObjectiveOutput(loss, {**figures, "mmd": discrepancy.detach()})


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """A deterministic autoencoder: the decoder sees the posterior's mean, and nothing presses that anywhere."""

    kind: Literal["autoencoder"] = "autoencoder"


class DeterministicAutoencoder(Objective):
    config: AutoencoderConfig
    best_metric, deterministic = "negative_log_likelihood", True

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        terms: Terms = model(images, 0)
        return ObjectiveOutput(-terms.log_likelihood.mean(), likelihood_figures(terms))


def likelihood_figures(terms: Terms) -> dict[str, Tensor]:
    return {"log_likelihood": terms.log_likelihood.detach().mean()}


# ---- the discrepancy ------------------------------------------------------------------------------------------------


def mmd(x: Tensor, y: Tensor, kernel: Kernel, bandwidth: float, scales: tuple[float, ...]) -> Tensor:
    """The squared maximum mean discrepancy of the distributions that x, n d, and y, m d, were drawn from, a scalar
    (Gretton et al. 2012, lemma 6): unbiased, so that it may be below 0."""
    within = [pairs_mean(kernel_matrix(one, one, kernel, bandwidth, scales)) for one in (x, y)]
    return within[0] + within[1] - 2 * kernel_matrix(x, y, kernel, bandwidth, scales).mean()


def pairs_mean(matrix: Tensor) -> Tensor:
    """The mean of n n over pairs of two, the diagonal left out."""
    count = len(matrix)
    return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))


def kernel_matrix(x: Tensor, y: Tensor, kernel: Kernel, bandwidth: float, scales: tuple[float, ...]) -> Tensor:
    """The kernel of each pair, n d and m d -> n m: with c = 2 d bandwidth^2 and the squared distance s,

    rbf   exp(-s / c)
    imq   sum_i c_i / (c_i + s),  c_i = c scales_i
    """
    squared = (x.unsqueeze(1) - y).square().sum(dim=-1)  # not by products, which lose digits of near pairs
    constant = 2 * x.shape[1] * bandwidth**2
    if kernel == "rbf":
        return (-squared / constant).exp()
    return torch.stack([constant * scale / (constant * scale + squared) for scale in scales]).sum(dim=0)
