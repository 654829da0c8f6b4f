"""Objectives of two modalities.

    subsampled      minus the sum of the ELBOs of both modalities and of either alone, each of which tells what it sees
                    (Wu and Goodman 2018, arXiv:1802.05335, equation 5): of a product of experts, each of which so
                    learns to stand alone. Where it tells both, as all subsets of MoPoE-VAE do (Sutter et al. 2021,
                    arXiv:2105.02470, equation 6), it has to know the other: an image its class
    mixture_bound   minus 1/M sum_m log 1/K sum_k w_mk of K draws of each expert, where
                    w = p(x_1|z) p(x_2|z) p(z) / (1/M sum_m q(z|x_m)) (Shi et al. 2019, arXiv:1911.03393, the looser of
                    their bounds), with its plain or its doubly reparameterised gradient

Of an image without its second modality, the first alone is seen; what cannot be seen adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput
from stage1_vae.objectives.importance import effective_draws, importance_bound, normalised_weights
from stage1_vae.objectives.terms import Terms, total_kl


@dataclass(frozen=True, kw_only=True)
class SubsampledConfig:
    """ELBOs of all subsets of the modalities."""

    kind: Literal["subsampled"] = "subsampled"
    beta: float = 1.0  # weight of the KL terms
    tells_both: Literal["none", "first", "all"] = "none"  # which modalities alone tell the other too, not what they see

    def __post_init__(self) -> None:
        tells = ("tells_both", self.tells_both in ("none", "first", "all"), "none, first or all")
        check_fields(self, [("beta", self.beta >= 0, "0 or more; 1 is the bound"), tells])


@dataclass(frozen=True, kw_only=True)
class MixtureBoundConfig:
    """An importance-weighted bound of draws of each expert."""

    kind: Literal["mixture_bound"] = "mixture_bound"
    draws_of_each: int = 5  # K, of each expert
    gradient: Literal["reparameterised", "doubly_reparameterised"] = "doubly_reparameterised"  # of encoders

    def __post_init__(self) -> None:
        gradients = ("reparameterised", "doubly_reparameterised")
        check_fields(
            self,
            [
                ("draws_of_each", self.draws_of_each >= 1, "at least 1"),
                ("gradient", self.gradient in gradients, " or ".join(gradients)),
            ],
        )


class MultimodalObjective(Objective):
    """Whose loss is of images and, where the pair has them, classes or texts."""

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        step: int,
        noise: Tensor | None = None,
        symbols: Tensor | None = None,
    ) -> ObjectiveOutput:
        raise NotImplementedError


class Subsampled(MultimodalObjective):
    config: SubsampledConfig

    @property
    def draws(self) -> int:
        return 3  # one of each subset

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        step: int,
        noise: Tensor | None = None,
        symbols: Tensor | None = None,
    ) -> ObjectiveOutput:
        assert noise is not None
        bounds = [
            terms.log_likelihood.mean(0) - self.config.beta * total_kl(terms)
            for terms in model(
                images,
                noise=noise.unsqueeze(1),
                symbols=symbols,
                training=True,
                tells_other=(self.config.tells_both != "none", self.config.tells_both == "all"),
            )
        ]
        names = ("joint_elbo", "first_elbo", "second_elbo")
        metrics = {name: bound.detach().mean() for name, bound in zip(names, bounds, strict=True)}
        return ObjectiveOutput(-torch.stack(bounds).sum(0).mean(), metrics)


class MixtureBound(MultimodalObjective):
    config: MixtureBoundConfig

    @property
    def draws(self) -> int:
        return 2 * self.config.draws_of_each

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        step: int,
        noise: Tensor | None = None,
        symbols: Tensor | None = None,
    ) -> ObjectiveOutput:
        assert noise is not None
        doubly = self.config.gradient == "doubly_reparameterised"
        parts: tuple[Terms, ...] = model(
            images, noise=noise.unflatten(0, (2, -1)), symbols=symbols, training=True, fixed_posterior=doubly
        )
        of_weights = doubly_reparameterised_bound if doubly else plain_bound
        bounds = torch.stack([of_weights(terms.log_weights, terms.latents[0]) for terms in parts])  # M b
        there = torch.ones_like(bounds)
        if symbols is not None:  # of an image without its second modality, draws of the first expert alone
            there[1] = symbols[:, 0] >= 0
        bound = (bounds * there).sum(0) / there.sum(0)
        effective = torch.stack([effective_draws(terms.log_weights.detach()) for terms in parts]).mean()
        return ObjectiveOutput(-bound.mean(), {"bound": bound.detach().mean(), "effective_draws": effective})


def plain_bound(log_weights: Tensor, latents: Tensor) -> Tensor:
    """L_K of each image, b: K b."""
    return importance_bound(log_weights)


def doubly_reparameterised_bound(log_weights: Tensor, latents: Tensor) -> Tensor:
    """L_K of each image, b, whose gradient reaches the encoders through draws alone, weighted by squared shares (Tucker
    et al. 2018, arXiv:1810.04152). log_weights: K b, in which log q is a function of the draws, not of its parameters;
    latents: K b d, the draws."""
    shares = normalised_weights(log_weights.detach())
    if latents.requires_grad:
        latents.register_hook(lambda gradient: shares.unsqueeze(-1) * gradient)
    same_gradient = (shares * log_weights).sum(0)
    return importance_bound(log_weights.detach()) + same_gradient - same_gradient.detach()
