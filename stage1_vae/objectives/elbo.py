"""The evidence lower bound, and what is done to its KL term: beta, annealing, free bits, a capacity.

    loss = -E_q[log p(x|z)] + weight * kl_term

with KL = KL(q(z|x) || p(z)), a mean over images, and kl_term one of

    KL                         the bound of Kingma and Welling 2013 (arXiv:1312.6114), beta-VAE where weight is beta
    sum_j max(nats, KL_j)      free bits: Kingma et al. 2016 (arXiv:1606.04934, equation 15)
    |KL - C|, for each image   capacity: Burgess et al. 2018 (arXiv:1804.03599, equation 8)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.schedules import cyclical_rise, linear_rise
from stage1_vae.objectives.terms import Terms, total_kl


@dataclass(frozen=True, kw_only=True)
class ELBOConfig:
    """beta * annealing weighs the KL term, and either free_nats or capacity changes it. All of them off is the ELBO."""

    kind: Literal["elbo"] = "elbo"
    draws: int = 1  # of the latents of each image
    beta: float = 1.0  # Higgins et al. 2017
    annealing: Literal["none", "linear", "cyclical"] = "none"  # of the KL term's weight, from annealing_start to beta
    annealing_start: float = 0.0  # as a share of beta
    annealing_steps: int = 0  # steps until it is beta for good; 0: all of train.steps
    annealing_cycles: int = 4  # of annealing=cyclical
    annealing_rise: float = 0.5  # likewise, share of a cycle over which the weight rises
    free_nats: float = 0.0  # KL, a mean over the batch, that costs nothing, of each ... ; 0 is off
    free_nats_of: Literal["dimension", "group"] = "dimension"  # number of the latents, or all of a group together
    capacity: float = 0.0  # C, nats of KL that each image is pressed to have; 0 is off
    capacity_steps: int = 0  # over which C rises from 0; 0: all of train.steps
    generator_prior_variance: float = 0.0  # kappa of a prior N(0, kappa I) on the generator's weights; 0 is off

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("beta", self.beta >= 0, "0 or more; 1 is the ELBO"),
                ("annealing", self.annealing in ("none", "linear", "cyclical"), "none, linear or cyclical"),
                ("annealing_start", 0 <= self.annealing_start <= 1, "a share of beta from 0 to 1"),
                ("annealing_steps", self.annealing_steps >= 0, "0, which is train.steps, or more"),
                ("annealing_cycles", self.annealing_cycles >= 1, "at least 1"),
                ("annealing_rise", 0 < self.annealing_rise <= 1, "a share of a cycle above 0, at most 1"),
                ("free_nats", self.free_nats >= 0, "0 (off) or more"),
                ("free_nats_of", self.free_nats_of in ("dimension", "group"), "dimension or group"),
                ("capacity", self.capacity >= 0, "0 (off) or more"),
                ("capacity", not (self.capacity and self.free_nats), "0 beside free_nats: give one of the two"),
                ("capacity_steps", self.capacity_steps >= 0, "0, which is train.steps, or more"),
                ("generator_prior_variance", self.generator_prior_variance >= 0, "0 (off) or more"),
            ],
        )


class ELBO(Objective):
    config: ELBOConfig

    def __init__(self, config: ELBOConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        if config.generator_prior_variance:
            self.reads_weights = "objective.generator_prior_variance"

    def weight(self, step: int) -> float:
        """Of the KL term at this step."""
        config = self.config
        if config.annealing == "none":
            return config.beta
        steps = config.annealing_steps or self.facts.steps
        if config.annealing == "linear":
            return config.beta * linear_rise(step, config.annealing_start, 1.0, steps)
        rise = config.annealing_rise
        return config.beta * cyclical_rise(step, config.annealing_start, steps, config.annealing_cycles, rise)

    def kl_term(self, terms: Terms, step: int) -> Tensor:
        """Scalar, in nats: what the weight is of."""
        config = self.config
        if config.free_nats:
            return free_kl(terms, config.free_nats, config.free_nats_of)
        if config.capacity:
            capacity = linear_rise(step, 0.0, config.capacity, config.capacity_steps or self.facts.steps)
            return (total_kl(terms) - capacity).abs().mean()
        return total_kl(terms).mean()

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        terms: Terms = model(images, self.config.draws, noise)
        weight, log_likelihood = self.weight(step), terms.log_likelihood.mean()
        loss = weight * self.kl_term(terms, step) - log_likelihood
        metrics = {**elbo_figures(terms), "weight": loss.new_tensor(weight)}
        if self.config.generator_prior_variance:
            prior = gaussian_weight_prior(self.facts.generator, self.config.generator_prior_variance)
            metrics["generator_prior"] = prior.detach() / self.facts.images
            loss = loss + prior / self.facts.images
        return ObjectiveOutput(loss, metrics)


# ---- what it is made of ---------------------------------------------------------------------------------------------


def elbo_figures(terms: Terms) -> dict[str, Tensor]:
    """Means over images of the two terms of the ELBO and of itself, in nats; detached."""
    log_likelihood, kl = terms.log_likelihood.detach().mean(), total_kl(terms).detach().mean()
    return {"log_likelihood": log_likelihood, "kl": kl, "elbo": log_likelihood - kl}


def free_kl(terms: Terms, nats: float, of: Literal["dimension", "group"]) -> Tensor:
    """sum_j max(nats, mean over the batch of KL_j), a scalar in nats, where j goes through the numbers of the latents,
    or through their groups. Where the KL of a group does not part, its numbers are one."""
    means = [group.mean(dim=0) for group in terms.kl]  # n each
    parts = torch.cat(means) if of == "dimension" else torch.stack([group.sum() for group in means])
    return parts.clamp(min=nats).sum()


def gaussian_weight_prior(weights: Iterable[Tensor], variance: float) -> Tensor:
    """-log N(weights; 0, variance I), a scalar in nats: the prior on the generator's weights of Rezende et al. 2014,
    "Stochastic Backpropagation and Approximate Inference in Deep Generative Models" (arXiv:1401.4082, section 2)."""
    squares, count = [], 0
    for weight in weights:
        squares.append(weight.float().square().sum())
        count += weight.numel()
    return torch.stack(squares).sum() / (2 * variance) + 0.5 * count * math.log(2 * math.pi * variance)
