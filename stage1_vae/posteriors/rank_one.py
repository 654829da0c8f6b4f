"""Gaussian posterior whose precision is a diagonal and a rank-one matrix, of Rezende, Mohamed and Wierstra 2014,
"Stochastic Backpropagation and Approximate Inference in Deep Generative Models" (arXiv:1401.4082, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer
from stage1_vae.posteriors.diagonal import HALF_LOG_TWO_PI, ScaleFunction, check_smallest_scale, log_normal, log_scales


@dataclass(frozen=True, kw_only=True)
class RankOneConfig:
    """q(z|x) = N(mean, C), C^-1 = diag(1 / scale^2) + u u^T: latents are correlated along one direction, u."""

    kind: Literal["rank_one"] = "rank_one"
    scale: ScaleFunction = "exp"  # of what the encoder says: exp(s / 2), softplus(s)
    smallest_scale: float = 0.0  # added to every scale

    def __post_init__(self) -> None:
        check_smallest_scale(self.smallest_scale)


class RankOne(Posterior):
    """mean, log_scale, direction (u): b *shape. Time and memory are linear in d, the numbers of an image's latents.

    The paper's factor of C is any; here it is the lower triangular one, which has as short a form. With v = scale u
    and g_i = 1 + v_i^2 + ... + v_d^2 (g_(d+1) = 1), noise e becomes

        z_i - mean_i = scale_i (e_i sqrt(g_(i+1) / g_i) - v_i sum_(j<i) v_j e_j / sqrt(g_j g_(j+1)))

    and log det C = sum_i log(scale_i^2 g_(i+1) / g_i) = sum_i log scale_i^2 - log(1 + u^T diag(scale^2) u). So the
    terms of a density are log q(z_i | z_1, ..., z_(i-1), x), as those of full covariance are.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor, direction: Tensor) -> None:
        self._mean, self.direction = mean, direction
        self.log_scale, self.scale = log_scale.flatten(1), log_scale.flatten(1).exp()  # b d, as all that follow
        self.v = direction.flatten(1) * self.scale
        self.g = 1 + self.v.square().flip(-1).cumsum(-1).flip(-1)  # g_1, ..., g_d
        self.g_next = F.pad(self.g[:, 1:], (0, 1), value=1.0)  # g_2, ..., g_(d+1)
        self.log_conditional = self.log_scale - 0.5 * torch.log1p(self.v.square() / self.g_next)  # scales of z_i | z_<i

    @property
    def mean(self) -> Tensor:
        return self._mean

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(count, *self._mean.shape, device=self._mean.device, generator=generator)

    def draw(self, noise: Tensor) -> Draws:
        flat = noise.flatten(2)
        pull = sum_before(self.v / (self.g * self.g_next).sqrt() * flat)
        offsets = self.log_conditional.exp() * flat - self.scale * self.v * pull
        return Draws(self._mean + offsets.unflatten(2, self._mean.shape[1:]), self.density_of_noise(flat))

    def log_density(self, latents: Tensor) -> Tensor:
        offsets = (latents - self._mean).flatten(2)
        pull = sum_before(self.v / self.scale * offsets) / self.g
        return self.density_of_noise((offsets + self.scale * self.v * pull) * (-self.log_conditional).exp())

    def density_of_noise(self, noise: Tensor) -> Tensor:
        """Of the latents that this noise, k b d, becomes."""
        return -0.5 * noise.square() - HALF_LOG_TWO_PI - self.log_conditional

    @property
    def variance(self) -> Tensor:
        """b d, of each number alone."""
        return self.scale.square() * (1 - self.v.square() / self.g[:, :1])

    def log_marginals(self, latents: Tensor) -> Tensor:
        return log_normal(latents.flatten(2), self._mean.flatten(1), self.variance)

    def kl_to_standard_normal(self) -> Tensor:
        return 0.5 * (self.variance + self._mean.flatten(1).square() - 1) - self.log_conditional

    def without_gradient(self) -> Self:
        log_scale = self.log_scale.unflatten(1, self._mean.shape[1:])
        return type(self)(self._mean.detach(), log_scale.detach(), self.direction.detach())


def sum_before(terms: Tensor) -> Tensor:
    """Of each, the sum of those before it in the last axis."""
    return F.pad(terms[..., :-1].cumsum(-1), (1, 0))


class RankOneLayer(PosteriorLayer):
    """Features: means, scales, u."""

    config: RankOneConfig

    def __init__(self, config: RankOneConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.features = 3 * shape[0]

    def forward(self, features: Tensor) -> RankOne:
        mean, raw, direction = features.float().chunk(3, dim=1)
        return RankOne(mean, log_scales(raw, self.config.scale, self.config.smallest_scale), direction)
