"""Gaussian posterior of full covariance (Kingma and Welling 2019, "An Introduction to Variational Autoencoders",
arXiv:1906.02691, section 2.5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer, vector_length, without_autocast
from stage1_vae.posteriors.diagonal import HALF_LOG_TWO_PI, ScaleFunction, check_smallest_scale, log_normal, log_scales


@dataclass(frozen=True, kw_only=True)
class FullCovarianceConfig:
    """q(z|x) = N(mean, L L^T), L = diag(scale) and, below the diagonal, any numbers: d (d - 1) / 2 of them."""

    kind: Literal["full_covariance"] = "full_covariance"
    scale: ScaleFunction = "exp"  # of what the encoder says: exp(s / 2), softplus(s)
    smallest_scale: float = 0.0  # added to every scale

    def __post_init__(self) -> None:
        check_smallest_scale(self.smallest_scale)


class FullCovariance(Posterior):
    """mean, log_scale: b d. lower: b d d, of which what lies below the diagonal counts.

    The terms of a density are log q(z_i | z_1, ..., z_(i-1), x).
    """

    def __init__(self, mean: Tensor, log_scale: Tensor, lower: Tensor) -> None:
        self._mean, self.log_scale, self.lower = mean, log_scale, lower.tril(-1)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def factor(self) -> Tensor:
        """L, b d d."""
        return self.lower + torch.diag_embed(self.log_scale.exp())

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(count, *self._mean.shape, device=self._mean.device, generator=generator)

    def draw(self, noise: Tensor) -> Draws:
        with without_autocast(noise):
            latents = self._mean + torch.einsum("bij,kbj->kbi", self.factor, noise)
        return Draws(latents, self.density_of_noise(noise))

    def log_density(self, latents: Tensor) -> Tensor:
        columns = (latents - self._mean).permute(1, 2, 0)
        return self.density_of_noise(torch.linalg.solve_triangular(self.factor, columns, upper=False).permute(2, 0, 1))

    def density_of_noise(self, noise: Tensor) -> Tensor:
        """Of the latents that this noise becomes: the log-determinant of L is the sum of log scales."""
        return -0.5 * noise.square() - HALF_LOG_TWO_PI - self.log_scale

    @property
    def variance(self) -> Tensor:
        """b d, of each number alone."""
        return self.lower.square().sum(-1) + (2 * self.log_scale).exp()

    def log_marginals(self, latents: Tensor) -> Tensor:
        return log_normal(latents, self._mean, self.variance)

    def kl_to_standard_normal(self) -> Tensor:
        return 0.5 * (self.variance + self._mean.square() - 1) - self.log_scale

    def without_gradient(self) -> Self:
        return type(self)(self._mean.detach(), self.log_scale.detach(), self.lower.detach())


class FullCovarianceLayer(PosteriorLayer):
    """Features: d means, d scales, and L's rows below the diagonal, one after the other."""

    config: FullCovarianceConfig

    def __init__(self, config: FullCovarianceConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.latents = vector_length(config.kind, shape)
        self.features = 2 * self.latents + self.latents * (self.latents - 1) // 2

    def forward(self, features: Tensor) -> FullCovariance:
        d = self.latents
        mean, raw, below = features.float().split([d, d, self.features - 2 * d], dim=1)
        rows, columns = torch.tril_indices(d, d, -1, device=features.device)
        lower = below.new_zeros(len(below), d, d)
        lower[:, rows, columns] = below
        return FullCovariance(mean, log_scales(raw, self.config.scale, self.config.smallest_scale), lower)
