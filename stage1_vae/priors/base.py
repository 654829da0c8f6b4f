"""What every prior over latents is that a VAE trains with: p(z)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stage1_vae.posteriors.base import LatentShape, Posterior


class LatentPrior(nn.Module):
    """p(z) over latents of the shape `*shape`: (d,), or (c, h, w) of a map."""

    def __init__(self, config: Any, shape: LatentShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    def log_density(self, latents: Tensor) -> Tensor:
        """log p(z), k b *shape -> k b n, in nats, as n terms that add up: one for each number of z where it parts so,
        else one alone."""
        raise NotImplementedError

    def kl(self, posterior: Posterior) -> Tensor | None:
        """KL(q(z|x) || p(z)) as terms that add up, b n, in nats; None where there is no closed form."""
        return None

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """count *shape, on the prior's device."""
        raise NotImplementedError
