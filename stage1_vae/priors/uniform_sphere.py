"""The prior of the hyperspherical VAE of Davidson et al. 2018 (arXiv:1804.00891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from stage1_vae.posteriors.base import LatentShape, Posterior
from stage1_vae.posteriors.von_mises_fisher import log_area
from stage1_vae.priors.base import LatentPrior


@dataclass(frozen=True, kw_only=True)
class UniformSphereConfig:
    """p(z) is the same for all unit vectors, for the posterior `von_mises_fisher`."""

    kind: Literal["uniform_sphere"] = "uniform_sphere"


class UniformSphere(LatentPrior):
    """Densities are over the sphere's area, and of one term."""

    place: Tensor

    def __init__(self, config: UniformSphereConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        if len(shape) != 1 or shape[0] < 2:
            raise UserError(
                f"prior.kind=uniform_sphere for latents of the shape {shape}, expected (d,), d of at least 2"
            )
        self.register_buffer("place", torch.empty(0), persistent=False)  # tells the device

    def log_density(self, latents: Tensor) -> Tensor:
        return latents.new_full((*latents.shape[:2], 1), -log_area(latents.shape[-1]))

    def kl(self, posterior: Posterior) -> Tensor | None:
        return posterior.kl_to_uniform_sphere()

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return F.normalize(torch.randn(count, *self.shape, device=self.place.device, generator=generator), dim=-1)
