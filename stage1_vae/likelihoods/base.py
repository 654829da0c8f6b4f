"""What every likelihood is: p(x|z), of images given what a decoder's network puts out for z."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Likelihood(nn.Module):
    """p(x|z) of images `... c H W` in [-1, 1], given `... o H W` of a network: all pixels are independent given those.

    outputs: o, how many channels the network must put out. discrete: whether it is a probability of images whose pixels
    have finitely many values, so that they can be coded without loss, and not a density.
    """

    discrete: bool
    outputs: int

    def __init__(self, config: Any, channels: int) -> None:
        """channels: c."""
        super().__init__()
        self.config = config
        self.channels = channels

    def log_prob(self, outputs: Tensor, images: Tensor, seen: Tensor | None = None) -> Tensor:
        """log p(x|z) of each image, in nats: `... o H W` and `... c H W`, whose leading axes broadcast, -> `...`. seen:
        `... 1 H W` bool, pixels that count, where not all do; the others hold any finite number."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """`... o H W` -> `... c H W`, in [-1, 1]: of p(x|z), or, where a likelihood says so, close to it."""
        raise NotImplementedError

    def mode(self, outputs: Tensor) -> Tensor:
        """Likewise: the most likely image, or, where a likelihood says so, each channel's most likely value in turn."""
        raise NotImplementedError

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Likewise: one draw of p(x|z)."""
        raise NotImplementedError


def at_least_float(outputs: Tensor) -> Tensor:
    """float64 as it is, all else as float32: likelihoods are computed in no type below."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def dequantised(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """8-bit images in [-1, 1] plus uniform noise as wide as the distance of two levels, 2/255: between -1 - 1/255 and
    1 + 1/255 (Theis et al. 2016, arXiv:1511.01844)."""
    noise = torch.rand(images.shape, dtype=images.dtype, device=images.device, generator=generator)
    return images + (noise - 0.5) * (2 / 255)


def bits_per_dimension(nats: Tensor, dimensions: int, discrete: bool) -> Tensor:
    """Of an 8-bit image of so many numbers (c H W), given -log p(x), or a bound above it, in nats; any shape.

    Of a discrete likelihood these are its own bits. Of a density of pixels in [-1, 1], x must be `dequantised`: a level
    is 2/255 wide, and the mean over the noise is an upper bound of the bits that the density, integrated over each
    level, takes (uniform dequantisation, the same reference). Without noise it bounds nothing, and may be negative.
    """
    bits = nats / (dimensions * math.log(2))
    return bits if discrete else bits + math.log2(255 / 2)
