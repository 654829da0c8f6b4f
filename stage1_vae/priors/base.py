"""What every prior over latents is that a VAE trains with: p(z)."""

from __future__ import annotations

from collections.abc import Callable
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

    def bind(self, image_shape: tuple[int, int, int], posterior: Callable[[Tensor], Posterior]) -> None:
        """What the VAE tells a prior that is made of its posteriors, once, when it is built: the c H W of its images
        and its `posterior`."""

    @property
    def start_images(self) -> int:
        """How many training images `start` is best given; 0 for none."""
        return 0

    def start(self, images: Tensor) -> None:
        """Before the first step: what a prior takes from training images, b c H W in [-1, 1], nan where pixels are
        missing, the same ones on all processes."""

    def log_density(self, latents: Tensor) -> Tensor:
        """log p(z), k b *shape -> k b n, in nats, as n terms that add up: one for each number of z where it parts so,
        else one alone."""
        raise NotImplementedError

    def log_marginals(self, latents: Tensor) -> Tensor | None:
        """log p(z_d) of each of the d numbers of latents alone, k b *shape -> k b d, in nats; None where there is no
        closed form."""
        return None

    def kl(self, posterior: Posterior) -> Tensor | None:
        """KL(q(z|x) || p(z)) as terms that add up, b n, in nats; None where there is no closed form."""
        return None

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """count *shape, on the prior's device."""
        raise NotImplementedError
