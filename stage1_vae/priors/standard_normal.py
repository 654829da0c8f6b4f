"""The prior of the VAE: N(0, I)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage1_vae.posteriors.base import LatentShape, Posterior, flat_terms
from stage1_vae.priors.base import LatentPrior


@dataclass(frozen=True, kw_only=True)
class StandardNormalConfig:
    """p(z) = N(0, I), which nothing need be learned for."""

    kind: Literal["standard_normal"] = "standard_normal"


class StandardNormal(LatentPrior):
    place: Tensor  # of nothing: it tells the device

    def __init__(self, config: StandardNormalConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("place", torch.empty(0), persistent=False)

    def log_density(self, latents: Tensor) -> Tensor:
        return flat_terms(-0.5 * latents.square() - 0.5 * math.log(2 * math.pi), 2)

    def log_marginals(self, latents: Tensor) -> Tensor | None:
        return self.log_density(latents)

    def kl(self, posterior: Posterior) -> Tensor | None:
        return posterior.kl_to_standard_normal()

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(count, *self.shape, device=self.place.device, generator=generator)
