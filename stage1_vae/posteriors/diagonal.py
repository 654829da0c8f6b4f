"""Diagonal Gaussian posterior of Kingma and Welling 2013, "Auto-Encoding Variational Bayes" (arXiv:1312.6114)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer, flat_terms

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)

ScaleFunction = Literal["exp", "softplus"]


@dataclass(frozen=True, kw_only=True)
class DiagonalGaussianConfig:
    """q(z|x) = N(mean, diag(scale^2))."""

    kind: Literal["diagonal"] = "diagonal"
    scale: ScaleFunction = "exp"  # of what the encoder says: exp(s / 2), s the log-variance; softplus(s)
    smallest_scale: float = 0.0  # added to every scale

    def __post_init__(self) -> None:
        check_smallest_scale(self.smallest_scale)


def log_normal(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(values; mean, variance) of each number."""
    return -0.5 * ((values - mean).square() / variance + variance.log()) - HALF_LOG_TWO_PI


class DiagonalGaussian(Posterior):
    """mean, log_scale: b *shape."""

    def __init__(self, mean: Tensor, log_scale: Tensor) -> None:
        self._mean, self.log_scale = mean, log_scale

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(count, *self._mean.shape, device=self._mean.device, generator=generator)

    def draw(self, noise: Tensor) -> Draws:
        density = -0.5 * noise.square() - HALF_LOG_TWO_PI - self.log_scale
        return Draws(self._mean + self.scale * noise, flat_terms(density, 2))

    def log_density(self, latents: Tensor) -> Tensor:
        noise = (latents - self._mean) / self.scale
        return flat_terms(-0.5 * noise.square() - HALF_LOG_TWO_PI - self.log_scale, 2)

    def log_marginals(self, latents: Tensor) -> Tensor | None:
        return self.log_density(latents)

    def kl_to_standard_normal(self) -> Tensor:
        return flat_terms(0.5 * (self._mean.square() + (2 * self.log_scale).exp() - 1) - self.log_scale, 1)

    def without_gradient(self) -> Self:
        return type(self)(self._mean.detach(), self.log_scale.detach())


class DiagonalGaussianLayer(PosteriorLayer):
    config: DiagonalGaussianConfig

    def __init__(self, config: DiagonalGaussianConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.features = 2 * shape[0]

    def forward(self, features: Tensor) -> DiagonalGaussian:
        mean, raw = features.float().chunk(2, dim=1)
        return DiagonalGaussian(mean, log_scales(raw, self.config.scale, self.config.smallest_scale))


def log_scales(raw: Tensor, scale: ScaleFunction, smallest_scale: float) -> Tensor:
    """The logs of the scales that an encoder says by any numbers."""
    if scale == "exp" and not smallest_scale:
        return 0.5 * raw
    scales = (0.5 * raw).exp() if scale == "exp" else F.softplus(raw)
    return (scales + smallest_scale).clamp(min=1e-8).log()


def check_smallest_scale(smallest_scale: float) -> None:
    if smallest_scale < 0:
        raise UserError(f"posterior.smallest_scale={smallest_scale}, expected 0 or more")
