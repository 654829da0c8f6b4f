"""Importance-weighted bounds, of K draws for each image, and how their gradients are estimated.

    L_K = E[log 1/K sum_k w_k],  w_k = p(x, z_k) / q(z_k|x)      Burda et al. 2015 (arXiv:1509.00519, equation 8)

L_1 is the ELBO, and L_K grows with K to log p(x). The gradient weighs draws by v_k = w_k / sum w. Of more draws the
generator learns better and the inference network, whose gradient drowns in noise, worse (Rainforth et al. 2018,
"Tighter Variational Bounds are Not Necessarily Better", arXiv:1802.04537), hence their three combinations:

    MIWAE   1/M sum_m L_K of M times K draws                     estimates = M
    CIWAE   beta L_1 + (1 - beta) L_K                            elbo_share = beta
    PIWAE   L_MK for the generator, MIWAE for the inference      generator_over_all

and the doubly reparameterised gradient of Tucker et al. 2018 (arXiv:1810.04152, equation 8), in which that of the
inference network is sum_k v_k^2 d log w_k / dz_k dz_k / d phi, without a noisy part whose mean is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.compatibility import never_compiled
from common.errors import check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput
from stage1_vae.objectives.elbo import elbo_figures
from stage1_vae.objectives.terms import Terms


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """IWAE; estimates, elbo_share and generator_over_all make others of it."""

    kind: Literal["importance"] = "importance"
    draws: int = 5  # K
    estimates: int = 1  # M: so many bounds of K draws each are averaged
    elbo_share: float = 0.0  # of the ELBO in the bound, beside L_K
    generator_over_all: bool = False  # the generator learns by one bound over all M K draws
    gradient: Literal["reparameterised", "doubly_reparameterised"] = "reparameterised"

    def __post_init__(self) -> None:
        gradients = ("reparameterised", "doubly_reparameterised")
        one = self.generator_over_all and self.estimates == 1
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("estimates", self.estimates >= 1, "at least 1"),
                ("estimates", not one, "at least 2 with generator_over_all: of one there is nothing to be over"),
                ("elbo_share", 0 <= self.elbo_share <= 1, "a share from 0 to 1"),
                ("gradient", self.gradient in gradients, " or ".join(gradients)),
            ],
        )

    @property
    def is_plain(self) -> bool:
        """Whether its gradient is that of its value, for all weights."""
        return self.gradient == "reparameterised" and not self.generator_over_all


class ImportanceWeighted(Objective):
    config: ImportanceConfig

    @property
    def draws(self) -> int:
        return self.config.draws * self.config.estimates

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        config = self.config
        draws, share = config.draws * config.estimates, config.elbo_share
        if config.is_plain:
            terms: Terms = model(images, draws, noise)
            bound = combined_bound(terms.log_weights, config.estimates, share)
        else:
            cut = Cut()
            terms = model(images, draws, noise, cut)
            parts = Parts(1 if config.generator_over_all else config.estimates, config.estimates, share)
            bound = bound_in_parts(terms, cut.drawn, parts, config.gradient == "doubly_reparameterised")
        effective = effective_draws(terms.log_weights.detach()).mean()
        metrics = {**elbo_figures(terms), "bound": bound.detach().mean(), "effective_draws": effective}
        return ObjectiveOutput(-bound.mean(), metrics)


# ---- bounds ---------------------------------------------------------------------------------------------------------


def importance_bound(log_weights: Tensor) -> Tensor:
    """L_K of each image, b, in nats, from the log weights of its draws, K b."""
    return log_weights.logsumexp(dim=0) - math.log(len(log_weights))


def normalised_weights(log_weights: Tensor) -> Tensor:
    """w_k / sum w, k b: so weighted, draws of q(z|x) stand for p(z|x). They are the gradient of L_K at log weights."""
    return log_weights.softmax(dim=0)


def combined_bound(log_weights: Tensor, estimates: int = 1, elbo_share: float = 0.0) -> Tensor:
    """elbo_share L_1 + (1 - elbo_share) 1/M sum_m L_K of each image, b: M = `estimates` bounds of K draws, MK b."""
    parts = log_weights.unflatten(0, (-1, estimates))  # K M b
    bound = importance_bound(parts).mean(dim=0)
    return bound if not elbo_share else elbo_share * log_weights.mean(dim=0) + (1 - elbo_share) * bound


def effective_draws(log_weights: Tensor) -> Tensor:
    """1 / sum of squared normalised weights of each image, b: how many equally weighted draws are worth as much."""
    return 1 / normalised_weights(log_weights).square().sum(dim=0)


# ---- gradients ------------------------------------------------------------------------------------------------------


class Cut:
    """A move that goes nowhere (stage1_vae.vae.Move): what is computed of the latents has no gradient beyond them, and
    they as they were drawn, with their graph, are kept."""

    drawn: Tensor

    @never_compiled
    def __call__(
        self, latents: Tensor, log_posterior: Tensor, log_joint: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        self.drawn = latents
        return latents.detach().requires_grad_(), log_posterior


class Parts(NamedTuple):
    """M of the generator's bound and of the inference network's, and the share of the ELBO in both."""

    generator: int
    inference: int
    elbo_share: float


def bound_in_parts(terms: Terms, drawn: Tensor, parts: Parts, doubly_reparameterised: bool) -> Tensor:
    """The generator's bound of each image, b. Its gradient at the weights of p(x|z) and p(z) is its own, and at those
    of q(z|x) that of the inference network's bound, plain or doubly reparameterised.

    terms: whose latents have no gradient beyond them, but one of their own; drawn: those latents with their graph.
    """
    (latents,), log_weights, share = terms.latents, terms.log_weights.detach(), parts.elbo_share
    log_joint = terms.log_likelihood + terms.log_prior[0].sum(-1)
    inference = slopes(log_weights, parts.inference, share)
    if doubly_reparameterised:
        density = terms.posteriors[0].without_gradient().log_density(latents).sum(-1)
        of_draws = (slopes(log_weights, parts.inference, share, power=2) * (log_joint - density)).sum()
        own = torch.zeros_like(log_joint)
    else:
        of_draws = (inference * log_joint).sum()
        own = inference * terms.log_posterior[0].sum(-1)
    (at_latents,) = torch.autograd.grad(of_draws, latents, retain_graph=True)
    through_draws = (at_latents * drawn).flatten(2).sum(-1)
    same_gradient = (slopes(log_weights, parts.generator, share) * log_joint + through_draws - own).sum(dim=0)
    return combined_bound(log_weights, parts.generator, share) + same_gradient - same_gradient.detach()


def slopes(log_weights: Tensor, estimates: int, elbo_share: float, power: int = 1) -> Tensor:
    """The gradient of `combined_bound` with respect to the log weights, MK b; with power=2 what the doubly
    reparameterised gradient has in its place for the draws, squares of the normalised weights."""
    normalised = normalised_weights(log_weights.unflatten(0, (-1, estimates))).flatten(0, 1)
    return elbo_share / len(log_weights) + (1 - elbo_share) / estimates * normalised**power
