"""The logit-Laplace likelihood of pixels (Ramesh et al. 2021, arXiv:2102.12092, appendix A.3).

A pixel has a bounded range, which a Gaussian or a Laplace density ignores: part of their mass lies where no pixel can
be. The logit-Laplace density is that of sigmoid(y) for y ~ Laplace(mean, scale), and lives on (0, 1). Its ends are left
out: images are mapped to [EPSILON, 1 - EPSILON], where x (1 - x), by which the density divides, stays away from 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 0.1


def map_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> pixels in [EPSILON, 1 - EPSILON]: the paper's 0.8 x + 0.1 of x in [0, 1]."""
    return (0.5 - EPSILON) * images + 0.5


def unmap_pixels(pixels: Tensor) -> Tensor:
    """The inverse of `map_pixels`: pixels in (0, 1) -> images, not clamped, so that a loss on them has a gradient
    everywhere; those in [EPSILON, 1 - EPSILON] become [-1, 1]."""
    return (pixels - 0.5) / (0.5 - EPSILON)


def logit_laplace_nll(mean: Tensor, log_scale: Tensor, pixels: Tensor) -> Tensor:
    """Negative log likelihood in nats of each element; all tensors have one shape.

    mean: of the Laplace density, in logits: sigmoid(mean) is the pixel expected; log_scale: ln of its scale b;
    pixels: in (0, 1), by `map_pixels`.
    """
    log_jacobian = pixels.log() + (-pixels).log1p()  # ln of d sigmoid(y) / dy = x (1 - x)
    return math.log(2) + log_scale + log_jacobian + (torch.logit(pixels) - mean).abs() * (-log_scale).exp()


def logit_laplace_bits(mean: Tensor, log_scale: Tensor, images: Tensor) -> Tensor:
    """Bits of each 8-bit pixel under the density: -log2 of its integral over the pixel's bin, the outermost bins with
    the tails beyond them, so that the probabilities of the 256 values add up to 1. Float64; all tensors have one shape.

    mean, log_scale: as for `logit_laplace_nll`; images: in [-1, 1], rounded here to the nearest of 256 values.
    """
    value = ((images.double() + 1) * 127.5).round().clamp(0, 255)
    edges = [map_pixels((value + side) / 127.5 - 1) for side in (-0.5, 0.5)]
    low, high = ((torch.logit(edge) - mean.double()) * (-log_scale.double()).exp() for edge in edges)
    low = low.masked_fill(value == 0, -math.inf)
    high = high.masked_fill(value == 255, math.inf)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)  # mirrored: low <= 0, tails precise
    inside_tail = high + torch.log1p(-(low - high).exp())  # both on the falling side: ln(e^high - e^low)
    around_mean = torch.log(2 - (-high.clamp(min=0)).exp() - low.exp())
    return 1 - torch.where(high <= 0, inside_tail, around_mean) / math.log(2)
