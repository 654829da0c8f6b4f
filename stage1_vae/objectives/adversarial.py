"""The adversarial autoencoder of Makhzani et al. 2015 (arXiv:1511.05644).

A discriminator learns to tell the latents of images from draws of the prior, and the encoder to deceive it: so the
aggregated posterior becomes the prior, as the KL term would have it of each posterior.

    loss = -E_q[log p(x|z)] + weight * softplus(-D(z))
    the discriminator's = softplus(-D(prior draws)) + softplus(D(z)),   D: logits
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import check_fields
from stage1_vae.networks.dense import DenseConfig, DenseLayers
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import elbo_figures
from stage1_vae.objectives.information import likelihood_figures
from stage1_vae.objectives.terms import Terms
from training.optimizers import OptimizerSettings
from training.task import Companion

COMPANION = "discriminator"  # its name in checkpoints and in the log


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """A network over latents, and how it learns: by Adam at a constant rate."""

    network: DenseConfig = field(default_factory=lambda: DenseConfig(hidden=(256,)))
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_fields(
            self,
            [
                ("learning_rate", self.learning_rate > 0, "above 0"),
                ("betas", all(0 <= beta < 1 for beta in self.betas), "from 0 to below 1"),
            ],
        )

    def build(self, latents: int, logits: int) -> Companion:
        network = DenseLayers(latents, logits, self.network)
        return Companion(network, OptimizerSettings(betas=self.betas), lambda step: self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class AdversarialAutoencoderConfig:
    """The KL term gives way to the judgement of a discriminator."""

    kind: Literal["adversarial"] = "adversarial"
    draws: int = 1  # of the latents of each image
    weight: float = 1.0  # of the adversarial loss
    deterministic: bool = False  # latents are the means of their posteriors, not draws
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("draws", self.draws == 1 or not self.deterministic, "1 beside deterministic=true"),
                ("weight", self.weight > 0, "above 0; objective.kind=autoencoder has no adversary"),
            ],
        )


class AdversarialAutoencoder(Objective):
    config: AdversarialAutoencoderConfig

    def __init__(self, config: AdversarialAutoencoderConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        self.deterministic = config.deterministic
        self.best_metric = "negative_log_likelihood"  # the bound has a KL that nothing here keeps small
        self.companions = {COMPANION: config.discriminator.build(math.prod(facts.latent_shape), 1)}

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        config, discriminator = self.config, self.companions[COMPANION].module
        terms: Terms = model(images, 0 if config.deterministic else config.draws, noise)
        latents = terms.latents[0].flatten(0, 1).flatten(1)  # k b, d
        prior = terms.priors[0].sample(len(latents)).flatten(1).detach()
        with frozen(discriminator):
            deceiving = F.softplus(-discriminator(latents).float()).mean()
        own = discriminator_loss(discriminator(prior).float(), discriminator(latents.detach()).float())
        figures = likelihood_figures(terms) if config.deterministic else elbo_figures(terms)
        figures |= {"adversarial_loss": deceiving.detach(), "discriminator_loss": own.detach()}
        loss = config.weight * deceiving - terms.log_likelihood.mean()
        return ObjectiveOutput(loss, figures, {COMPANION: own})

    def validation_figures(self, terms: Terms) -> dict[str, Tensor]:
        return {"negative_log_likelihood": -terms.log_likelihood.mean(dim=0)}


def discriminator_loss(prior: Tensor, latents: Tensor) -> Tensor:
    """Logits of draws of the prior and of latents of images -> the cross-entropy of telling them apart, a scalar."""
    return F.softplus(-prior).mean() + F.softplus(latents).mean()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """What is computed here has no gradient at the network's weights."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
