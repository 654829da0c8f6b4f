"""Likelihoods of the numbers of a row, p(x|z), each number by itself: Gaussian, and Student's t, whose tails forgive
outliers (Mattei and Frellsen 2019, arXiv:1812.02633)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.posteriors.diagonal import HALF_LOG_TWO_PI

LikelihoodKind = Literal["student", "gaussian"]

SMALLEST_SCALE = 0.001  # of standardised numbers
SMALLEST_FREEDOM = 3.0  # degrees: a variance exists


class Gaussian(NamedTuple):
    """mean, scale: ... p."""

    mean: Tensor
    scale: Tensor

    def log_density(self, values: Tensor) -> Tensor:
        """log p of each number in nats, ... p."""
        return -0.5 * ((values - self.mean) / self.scale).square() - self.scale.log() - HALF_LOG_TWO_PI

    def draw(self, noise: Tensor) -> Tensor:
        """... p, a differentiable function of normal noise, ... 2p, of which one half is not needed."""
        return self.mean + self.scale * noise.chunk(2, dim=-1)[0]


class StudentT(NamedTuple):
    """mean, scale and degrees of freedom: ... p."""

    mean: Tensor
    scale: Tensor
    freedom: Tensor

    def log_density(self, values: Tensor) -> Tensor:
        """log p of each number in nats, ... p."""
        freedom, deviation = self.freedom, (values - self.mean) / self.scale
        constant = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * (freedom * math.pi).log()
        return constant - self.scale.log() - (freedom + 1) / 2 * (deviation.square() / freedom).log1p()

    def draw(self, noise: Tensor) -> Tensor:
        """... p, a differentiable function of normal noise, ... 2p: the polar method of Bailey 1994, "Polar Generation
        of Random Variates with the t-Distribution" (Mathematics of Computation 62). A normal pair with the squared
        radius w becomes one of t's when it is stretched by sqrt(expm1(w / freedom) freedom / w)."""
        one, other = noise.chunk(2, dim=-1)
        share = (one.square() + other.square()) / self.freedom
        return self.mean + self.scale * one * (share.expm1() / share.clamp(min=1e-20)).sqrt()


Density = Gaussian | StudentT


def outputs_for(kind: LikelihoodKind, numbers: int) -> int:
    """How many numbers a network must put out for a row of so many."""
    return (2 if kind == "gaussian" else 3) * numbers


def density_of(kind: LikelihoodKind, outputs: Tensor) -> Density:
    """Of what a network puts out, `... outputs_for`: means, then scales, then degrees of freedom."""
    outputs = at_least_float(outputs)
    if kind == "gaussian":
        mean, scale = outputs.chunk(2, dim=-1)
        return Gaussian(mean, F.softplus(scale) + SMALLEST_SCALE)
    mean, scale, freedom = outputs.chunk(3, dim=-1)
    return StudentT(mean, F.softplus(scale) + SMALLEST_SCALE, F.softplus(freedom) + SMALLEST_FREEDOM)
