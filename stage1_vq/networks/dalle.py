"""Encoder and decoder of DALL-E's dVAE (Ramesh et al. 2021, arXiv:2102.12092, appendix A.1), as its authors publish it.

Groups of residual blocks, each group at half the resolution and twice the width of the one before, with max-pooling
down and nearest neighbours up. All that touches the vocabulary is the quantizer's: the encoder's last 1x1 convolution
to one logit per code, and the decoder's first, from one-hot codes.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_KERNELS = (3, 3, 3, 1)  # of the four convolutions of a residual block
DECODER_KERNELS = (1, 3, 3, 3)


def convolution(width_in: int, width_out: int, kernel: int) -> nn.Conv2d:
    """Keeps height and width; its outputs start with the variance of its inputs."""
    layer = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(width_in * kernel**2) ** -0.5)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class ResidualBlock(nn.Module):
    """skip(x) + gain * four convolutions, each after a ReLU, a quarter as wide inside."""

    def __init__(self, width_in: int, width_out: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        inner = width_out // 4
        widths = pairwise([width_in, inner, inner, inner, width_out])
        self.skip = convolution(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.convolutions = nn.ModuleList(
            convolution(before, after, kernel) for (before, after), kernel in zip(widths, kernels, strict=True)
        )
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.convolutions:
            residual = layer(F.relu(residual))
        return self.skip(x) + self.gain * residual


def residual_groups(widths: list[int], blocks: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    """One group of `blocks` residual blocks from each width to the next. The gain keeps the sum of all residuals of the
    order of the skipped signal."""
    gain = ((len(widths) - 1) * blocks) ** -2
    return nn.ModuleList(
        nn.Sequential(*(ResidualBlock(after if block else before, after, kernels, gain) for block in range(blocks)))
        for before, after in pairwise(widths)
    )


class DalleEncoder(nn.Module):
    """Pixels in [0.1, 0.9], b c H W -> features, b d h w: 7x7 convolution, groups with max-pooling between them, ReLU,
    and a 1x1 convolution where the last group's width is not `width_out`."""

    def __init__(self, *, channels: int, width: int, groups: int, blocks: int, width_out: int) -> None:
        """width: of the first group; each further one is twice as wide."""
        super().__init__()
        widths = [width * 2**group for group in range(groups)]
        self.input = convolution(channels, width, 7)
        self.groups = residual_groups([width, *widths], blocks, ENCODER_KERNELS)
        self.output = convolution(widths[-1], width_out, 1) if widths[-1] != width_out else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.input(pixels)
        for number, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if number else x)
        return self.output(F.relu(x))


class DalleDecoder(nn.Module):
    """z_q, b d h w -> statistics of the pixels, b channels H W: groups with nearest-neighbour up-sampling between them,
    ReLU, 1x1 convolution."""

    def __init__(self, *, width_in: int, channels: int, width: int, groups: int, blocks: int) -> None:
        """width: of the last group; each one before it is twice as wide."""
        super().__init__()
        widths = [width * 2**group for group in reversed(range(groups))]
        self.groups = residual_groups([width_in, *widths], blocks, DECODER_KERNELS)
        self.output = convolution(width, channels, 1)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))

    def trunk(self, z_q: Tensor) -> Tensor:
        x = z_q
        for number, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2, mode="nearest") if number else x)
        return F.relu(x)

    def last(self, features: Tensor) -> Tensor:
        return self.output(features)
