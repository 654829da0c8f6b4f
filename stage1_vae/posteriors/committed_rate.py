"""Diagonal Gaussian posterior that cannot come closer to N(0, I) than a committed rate: Razavi et al. 2019, "Preventing
Posterior Collapse with delta-VAEs" (arXiv:1901.03416), the family for independent latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.errors import check_fields
from stage1_vae.posteriors.base import LatentShape, PosteriorLayer
from stage1_vae.posteriors.diagonal import DiagonalGaussian


@dataclass(frozen=True, kw_only=True)
class CommittedRateConfig:
    """q(z|x) = N(mean, diag(scale^2)), with KL(q(z|x) || N(0, I)) >= rate for every image."""

    kind: Literal["committed_rate"] = "committed_rate"
    rate: float = 5.0  # delta in nats, of an image's latents: each number of them has an equal share

    def __post_init__(self) -> None:
        check_fields(self, (("rate", self.rate > 0, "above 0"),))


class CommittedRateLayer(PosteriorLayer):
    """The scale of a number lies between the two at which a mean of 0 has its share of the rate, s of which both are
    solutions of s^2 - log s^2 = 1 + 2 share. Between them the mean keeps a distance from 0, either side, whose square
    is what is missing: 2 share + 1 + log s^2 - s^2. (The paper keeps it on the positive side.)"""

    config: CommittedRateConfig

    def __init__(self, config: CommittedRateConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.features = 2 * shape[0]
        self.share = config.rate / math.prod(shape)
        self.log_scales = bounding_log_scales(self.share)

    def forward(self, features: Tensor) -> DiagonalGaussian:
        raw_mean, raw_scale = features.float().chunk(2, dim=1)
        smallest, largest = self.log_scales
        log_scale = smallest + (largest - smallest) * raw_scale.sigmoid()
        missing = (2 * self.share + 1 + 2 * log_scale - (2 * log_scale).exp()).clamp(min=1e-12)
        side = torch.where(raw_mean < 0, -1.0, 1.0)
        return DiagonalGaussian(raw_mean + side * missing.sqrt(), log_scale)


def bounding_log_scales(share: float) -> tuple[float, float]:
    """The two solutions log s of s^2 - log s^2 = 1 + 2 share, the one below 0 first, by bisection."""
    found = []
    for inside, outside in ((0.0, -(1 + 2 * share)), (0.0, math.log(4 + 4 * share))):  # of log s^2
        for _ in range(200):
            middle = (inside + outside) / 2
            if math.exp(middle) - middle < 1 + 2 * share:
                inside = middle
            else:
                outside = middle
        found.append(inside / 2)
    return found[0], found[1]
