"""The Hamiltonian VAE of Caterini et al. 2018 (arXiv:1805.11328).

Draws z_0 of q(z|x) are moved towards the posterior by a leapfrog integrator with the potential -log p(x, z) and a
momentum r_0 ~ N(0, I / beta_0), which is cooled: after step k of K it is multiplied by sqrt(beta_(k-1) / beta_k), where
1 / sqrt(beta_k) falls from 1 / sqrt(beta_0) to 1 quadratically (equation 8). All of that is invertible, and its
Jacobian's determinant is beta_0^(d/2), which the density of r_0 takes away again:

    bound = E[log p(x, z_K) + log N(r_K; 0, I) - log q(z_0|x) - log N(g; 0, I)],   g = sqrt(beta_0) r_0

The model that it trains is a VAE: q(z|x) is where draws begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.compatibility import never_compiled
from common.draws import normal_like
from common.errors import check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import elbo_figures
from stage1_vae.objectives.terms import Terms, elbo
from stage1_vae.posteriors.base import LatentShape
from training.optimizers import OptimizerSettings
from training.task import Companion

COMPANION = "leapfrog"  # its name in checkpoints and in the log


@dataclass(frozen=True, kw_only=True)
class HamiltonianConfig:
    """The ELBO of draws that were moved by gradients of log p(x, z)."""

    kind: Literal["hamiltonian"] = "hamiltonian"
    draws: int = 1  # of the latents of each image
    leapfrog_steps: int = 3  # K; each costs a gradient of the decoder
    step_size: float = 0.01  # of each number of the latents, at first
    temperature: float = 0.3  # beta_0, the inverse variance of the first momentum, at first
    learned: bool = True  # whether step sizes and beta_0 learn too, ...
    learning_rate: float = 1e-3  # ... by Adam at this constant rate

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("leapfrog_steps", self.leapfrog_steps >= 1, "at least 1; objective.kind=elbo has none"),
                ("step_size", self.step_size > 0, "above 0"),
                ("temperature", 0 < self.temperature < 1, "between 0 and 1, where 1 is not tempered"),
                ("learning_rate", self.learning_rate > 0, "above 0"),
            ],
        )


class Hamiltonian(Objective):
    config: HamiltonianConfig

    def __init__(self, config: HamiltonianConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        self.leapfrog = Leapfrog(config, facts.latent_shape)
        rate = config.learning_rate
        learning = (OptimizerSettings(), lambda step: rate) if config.learned else (None, None)
        self.leapfrog.requires_grad_(config.learned)
        self.companions = {COMPANION: Companion(self.leapfrog, *learning)}

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        terms: Terms = model(images, self.config.draws, noise, self.leapfrog)
        # The leapfrog's weights learn by the model's loss, of which they are a part.
        return ObjectiveOutput(-elbo(terms).mean(), elbo_figures(terms))


class Leapfrog(nn.Module):
    """Moves draws (stage1_vae.vae.Move). Its weights: the step size of each number, and beta_0."""

    def __init__(self, config: HamiltonianConfig, shape: LatentShape) -> None:
        super().__init__()
        self.steps = config.leapfrog_steps
        self.log_step_size = nn.Parameter(torch.full(shape, math.log(config.step_size)))
        root = math.sqrt(config.temperature)
        self.root_logit = nn.Parameter(torch.tensor(math.log(root / (1 - root))))  # of sqrt(beta_0), below 1

    def momentum(self, latents: Tensor) -> Tensor:
        """N(0, I), like the latents, k b *shape: what the first momentum is before its temperature."""
        return normal_like(latents, axis=1)

    @never_compiled
    def forward(
        self, latents: Tensor, log_posterior: Tensor, log_joint: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        size, root = self.log_step_size.exp(), self.root_logit.sigmoid()
        noise = self.momentum(latents)
        place, momentum, slope = latents, noise / root, slope_of(log_joint, latents)
        inverse_root = 1 / root  # 1 / sqrt(beta_k)
        for k in range(1, self.steps + 1):
            halfway = momentum + 0.5 * size * slope
            place = place + size * halfway
            slope = slope_of(log_joint, place)
            cooler = 1 / root + (1 - 1 / root) * (k / self.steps) ** 2
            momentum = (cooler / inverse_root) * (halfway + 0.5 * size * slope)
            inverse_root = cooler
        gained = (0.5 * momentum.square() - 0.5 * noise.square()).flatten(2)  # log N(g) - log N(r_K), number by number
        if gained.shape[-1] != log_posterior.shape[-1]:
            gained, log_posterior = gained.sum(-1, keepdim=True), log_posterior.sum(-1, keepdim=True)
        return place, log_posterior + gained


def slope_of(log_joint: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """d log p(x, z) / dz, like the latents, with a graph of its own where gradients are computed at all."""
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        place = latents if latents.requires_grad else latents.detach().requires_grad_()
        return torch.autograd.grad(log_joint(place).sum(), place, create_graph=with_graph)[0]
