"""Gaussian likelihood, with a variance that is given, learned, or the best one of a batch (sigma-VAE of Rybkin et al.
2021, "Simple and Effective VAE Training with Calibrated Decoders", arXiv:2006.13202)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.distributed import global_mean
from common.errors import UserError
from stage1_vae.likelihoods.base import Likelihood, at_least_float


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """A density of pixels in [-1, 1]: each number is N(mean, scale^2). `bits_per_dimension` tells what it is of 8-bit
    images; without uniform noise on those (`dequantised`) it is no bound of anything, and can grow without limit."""

    kind: Literal["gaussian"] = "gaussian"
    variance: Literal["fixed", "learned", "per_pixel", "optimal"] = "fixed"  # learned: one for all; per_pixel: by z
    scale: float = 1.0  # the standard deviation, of pixels in [-1, 1]; where it is learned, that at the beginning
    smallest_log_scale: float = -6.0  # a soft limit where it is learned, a hard one of the optimal one

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise UserError(f"likelihood.scale={self.scale}, expected a number above 0")
        if not math.isfinite(self.smallest_log_scale):
            raise UserError(f"likelihood.smallest_log_scale={self.smallest_log_scale}, expected a number such as -6")


def log_density(images: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log N(images; means, exp(log_scales)^2) of each number, in nats."""
    deviations = (images - means) * (-log_scales).exp()
    return -0.5 * deviations.square() - log_scales - 0.5 * math.log(2 * math.pi)


def above(limit: float, log_scales: Tensor) -> Tensor:
    """Log-scales that bend before they reach the limit, and stay above it."""
    return limit + F.softplus(log_scales - limit)


class Gaussian(Likelihood):
    """The network puts out means and, of `per_pixel`, what is added to log(scale), as many. Means and draws may lie
    beyond [-1, 1].

    Of `optimal` the variance is in training the mean squared error of all that is computed at once: all images, draws
    and processes, but each micro-batch by itself. It is then what an image's own likelihood would have to be maximised
    by, and the loss is the logarithm of that error. Validation and samples, for which there is no such batch, use one
    scale that follows it in training: its gradient is that of a learned one, divided by the image's numbers, and passes
    to nothing else.
    """

    discrete = False
    config: GaussianConfig

    def __init__(self, config: GaussianConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.outputs = 2 * channels if config.variance == "per_pixel" else channels
        if config.variance in ("learned", "optimal"):
            self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))

    def parts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means, `... c H W`, and log-scales, of the same shape, or a scalar where all have one."""
        outputs = at_least_float(outputs)
        means, start = outputs.narrow(-3, 0, self.channels), math.log(self.config.scale)
        if self.config.variance == "fixed":
            return means, means.new_tensor(start)
        if self.config.variance == "per_pixel":
            raw = outputs.narrow(-3, self.channels, self.channels) + start
        else:
            raw = self.log_scale.to(means.dtype)
        return means, above(self.config.smallest_log_scale, raw)

    def log_prob(self, outputs: Tensor, images: Tensor, seen: Tensor | None = None) -> Tensor:
        means, log_scales = self.parts(outputs)
        if seen is not None:
            assert self.config.variance != "optimal"
            return (log_density(images, means, log_scales) * seen).sum(dim=(-3, -2, -1))
        if self.config.variance != "optimal" or not self.training:
            return log_density(images, means, log_scales).sum(dim=(-3, -2, -1))
        best = optimal_log_scale(images, means, self.config.smallest_log_scale)
        following = log_density(images, means.detach(), log_scales).mean(dim=(-3, -2, -1))
        return log_density(images, means, best).sum(dim=(-3, -2, -1)) + (following - following.detach())

    def mean(self, outputs: Tensor) -> Tensor:
        return self.parts(outputs)[0]

    def mode(self, outputs: Tensor) -> Tensor:
        return self.parts(outputs)[0]

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        means, log_scales = self.parts(outputs)
        noise = torch.randn(means.shape, dtype=means.dtype, device=means.device, generator=generator)
        return means + log_scales.exp() * noise


def optimal_log_scale(images: Tensor, means: Tensor, smallest: float) -> Tensor:
    """Of the one scale by which images are most likely, over all processes, but not below the smallest: scalar."""
    error = global_mean((images - means).square().mean())
    return 0.5 * error.clamp(min=math.exp(2 * smallest)).log()
