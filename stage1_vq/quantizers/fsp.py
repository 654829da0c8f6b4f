"""Finite scalar perturbation (arXiv:2602.17133): each number of a narrow latent becomes a share of its distribution,
from 0 to 1, which is cut into equal parts. In training most numbers are moved by up to half a part, in place of being
rounded: the decoder sees noise as large as the error of rounding, and gradients pass as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes
from common.draws import uniform
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.fsq import MOST_CODES
from stage1_vq.quantizers.gradients import StraightThrough

EDGE = torch.finfo(torch.float32).eps  # how near the shares 0 and 1 are taken as they are
SPREAD = 12**-0.5  # standard deviation of a uniform share
MOMENT_WEIGHTS = (0.1, 0.07, 0.06, 0.05)  # of the squared differences of mean, variance, skewness and kurtosis


@dataclass(frozen=True)
class Distribution:
    """What the numbers of the latent are taken to be: cumulative distribution function, its inverse, and moments as the
    package rounds them."""

    share: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    variance: float
    kurtosis: float  # excess


DISTRIBUTIONS = {
    "tanh": Distribution(  # logistic, half as wide
        lambda z: (torch.tanh(z) + 1) / 2, lambda share: torch.atanh(2 * share - 1), 0.8225, 1.2
    ),
    "sigmoid": Distribution(torch.sigmoid, torch.logit, 3.29, 1.2),
    "normal": Distribution(
        lambda z: (1 + torch.erf(z / 2**0.5)) / 2, lambda share: 2**0.5 * torch.erfinv(2 * share - 1), 1.0, 0.0
    ),
    "laplace": Distribution(
        lambda z: (1 - z.sign() * torch.expm1(-z.abs())) / 2,
        lambda share: -(share - 0.5).sign() * torch.log1p(-2 * (share - 0.5).abs()),
        2.0,
        3.0,
    ),
    # It has no moments; these keep latents from running away.
    "cauchy": Distribution(
        lambda z: torch.atan(z) / math.pi + 0.5, lambda share: torch.tan(math.pi * (share - 0.5)), 1.0, 0.0
    ),
}


@dataclass(frozen=True, kw_only=True)
class FSPConfig:
    """Levels as for FSQ; the other defaults are those of vector-quantize-pytorch."""

    kind: Literal["fsp"] = "fsp"
    levels: tuple[int, ...] = (8, 5, 5, 5)  # of each number of the latent; their product is the vocabulary
    dim: int = 4  # width of z and z_q; other than the number of levels: with a 1x1 convolution before and one after
    distribution: Literal["tanh", "sigmoid", "normal", "laplace", "cauchy"] = "tanh"  # of each number of the latent
    quantized_share: float = 0.0  # of numbers that training rounds, as eval mode does all; the rest are perturbed
    as_latents: bool = False  # z_q goes back through the distribution's inverse; else shares at variance 1
    moments: Literal[0, 2, 4] = 2  # that latents are drawn to: none; mean and variance; skewness and kurtosis too
    moments_weight: float = 1.0  # of that loss
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        rules = [
            ("levels", len(self.levels) > 0 and min(self.levels) >= 2, "numbers of at least 2, such as [8, 5, 5, 5]"),
            ("levels", math.prod(self.levels) <= MOST_CODES, f"a product of at most {MOST_CODES}: use fewer or lower"),
            ("dim", self.dim >= 1, "at least 1"),
            ("distribution", self.distribution in DISTRIBUTIONS, f"one of {', '.join(DISTRIBUTIONS)}"),
            ("quantized_share", 0 <= self.quantized_share <= 1, "a share from 0 to 1"),
            ("moments", self.moments in (0, 2, 4), "0, 2 or 4"),
            ("moments_weight", self.moments_weight >= 0, "0 or more"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
        ]
        check_fields(self, rules)


class FSPQuantizer(CountingQuantizer):
    """z -> [1x1 convolution to len(levels)] -> share of the distribution -> perturbed, or the middle of its part ->
    [inverse] -> [1x1 convolution to dim] -> z_q.

    A part's place among the L of its number is its digit, 0 to L - 1; the digits, first one fastest, are the code. All
    in float32, also under autocast; z_q has the type of z.
    """

    config_class = FSPConfig
    remedies = ("fewer or lower {path}.levels", "{path}.moments=2")

    levels: Tensor  # levels 1 1
    places: Tensor  # levels 1 1, int64: what a digit is worth in the code

    def __init__(self, config: FSPConfig) -> None:
        super().__init__(config.dim, math.prod(config.levels), config.warn_usage_below)
        self.config = config
        self.distribution = DISTRIBUTIONS[config.distribution]
        count = len(config.levels)
        projected = config.dim != count
        self.project_in = ProductConv2d(config.dim, count) if projected else nn.Identity()
        self.project_out = ProductConv2d(count, config.dim) if projected else nn.Identity()
        places = [math.prod(config.levels[:number]) for number in range(count)]
        self.register_buffer("levels", torch.tensor(config.levels).view(-1, 1, 1), persistent=False)
        self.register_buffer("places", torch.tensor(places).view(-1, 1, 1), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Training mode draws noise (common/draws.py). Losses, in training mode: `moments_loss`, the
        squared differences of the moments of each number over the batch from those of the distribution, means over the
        numbers, times their weights. Statistics: `quantization_error`, the squared error per number of the share
        beside the middle of its part."""
        with float32_island(z.device.type):
            narrow = self.narrow(z)
            shares = self.distribution.share(narrow)
            digits = self.digits(shares)
            codes = self.codes_of(digits)
            middles = self.middles(digits)
            losses = {}
            seen = StraightThrough.apply(shares, middles)
            if self.training:
                self.usage.note(codes)
                if self.config.quantized_share < 1:
                    rounded = uniform(*shares.shape, device=z.device) <= self.config.quantized_share
                    seen = torch.where(rounded, seen, self.perturbed(shares))
                if self.config.moments and self.config.moments_weight:
                    losses["moments_loss"] = self.config.moments_weight * self.moments_loss(narrow)
            values = self.values(seen)
            if self.config.as_latents:
                # The inverse is steep at the ends: the gradient passes the way there and back as through nothing.
                values = StraightThrough.apply(narrow, values.detach())
            error = F.mse_loss(shares.detach(), middles)
            return Quantized(self.project_out(values).to(z.dtype), (codes,), losses, {"quantization_error": error})

    def codes(self, z: Tensor) -> Codes:
        with float32_island(z.device.type):
            return (self.codes_of(self.digits(self.distribution.share(self.narrow(z)))),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        with float32_island(only.device.type):
            digits = rearrange(only, "b h w -> b 1 h w") // self.places % self.levels
            return self.project_out(self.values(self.middles(digits.float())))

    def narrow(self, z: Tensor) -> Tensor:
        """b levels h w."""
        self.check_latents(z)
        return self.project_in(z.float())

    def digits(self, shares: Tensor) -> Tensor:
        """b levels h w, whole numbers as floats: 0 to the number's levels - 1."""
        return (shares.detach().nan_to_num().clamp(max=1 - EDGE) * self.levels).floor()

    def middles(self, digits: Tensor) -> Tensor:
        return (digits + 0.5) / self.levels

    def perturbed(self, shares: Tensor) -> Tensor:
        """Moved by up to half a part, but where that leaves the numbers from 0 to 1."""
        moved = shares + (2 * uniform(*shares.shape, device=shares.device) - 1) / (2 * self.levels)
        return torch.where((moved > 0) & (moved < 1), moved, shares)

    def values(self, shares: Tensor) -> Tensor:
        """The numbers of z_q, before the last projection."""
        if self.config.as_latents:
            return self.distribution.inverse(shares.clamp(EDGE, 1 - EDGE))
        return (shares - 0.5) / SPREAD

    def moments_loss(self, narrow: Tensor) -> Tensor:
        """A scalar; of the latents of this micro-batch."""
        rows = rearrange(narrow, "b levels h w -> (b h w) levels")
        variance, mean = torch.var_mean(rows, dim=0)
        normed = (rows - mean) / variance.sqrt().clamp(min=1e-8)
        target = self.distribution
        differences = [mean, variance - target.variance]
        if self.config.moments == 4:
            differences += [normed.pow(3).mean(0), normed.pow(4).mean(0) - 3 - target.kurtosis]
        weighted = zip(MOMENT_WEIGHTS[: len(differences)], differences, strict=True)
        return torch.stack([weight * difference.square().mean() for weight, difference in weighted]).sum()

    def codes_of(self, digits: Tensor) -> Tensor:
        """b h w, int64."""
        return (digits.long() * self.places).sum(1)
