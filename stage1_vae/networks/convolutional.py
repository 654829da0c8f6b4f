"""Residual convolutional networks between images and latents, without normalisation.

They are made of convolutions of 3x3 and 1x1 pixels and of 2x2 pixels side by side, linear layers, activations,
additions, pixel shuffles and repetition of pixels only: all of which can be evaluated once more in exact arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.posteriors.base import LatentShape

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


@dataclass(frozen=True, kw_only=True)
class ConvolutionalConfig:
    """Residual blocks at the image's resolution, then at half of it, and so on, or the other way round. The encoder
    reads pixels in [-1, 1]."""

    kind: Literal["convolutional"] = "convolutional"
    widths: tuple[int, ...] = (32, 64, 64)  # channels at each resolution: the image's, half of it, a quarter ...
    residual_blocks: int = 1  # at each resolution
    activation: Literal["relu", "elu", "silu"] = "silu"
    map: bool = False  # latents are a map of the lowest resolution, of model.latents channels, not one vector
    skip: bool = False  # of a decoder: every layer after the first reads the latents too (Dieng et al. 2018, Skip-VAE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or any(width < 1 for width in self.widths):
            raise UserError(f"widths={self.widths}, expected at least one number of channels, each of at least 1")
        if self.residual_blocks < 0:
            raise UserError(f"residual_blocks={self.residual_blocks}, expected 0 or more")

    @property
    def downsamplings(self) -> int:
        return len(self.widths) - 1

    def lowest_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of images -> (h, w) of the lowest resolution. Raises UserError where halving leaves a remainder."""
        stride = 2**self.downsamplings
        height, width = image_size
        if height % stride or width % stride:
            raise UserError(
                f"images of {height}x{width} pixels are halved {self.downsamplings} times by widths={self.widths}, "
                f"which takes sides that are multiples of {stride}: choose another data.image_size, or fewer widths"
            )
        return height // stride, width // stride


class ResidualBlock(nn.Module):
    """`n c h w` -> `n c h w`."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.activation(self.first(self.activation(x))))


class Downsampling(nn.Module):
    """`n c h w` -> `n d h/2 w/2`."""

    def __init__(self, width: int, following: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, following, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


class Upsampling(nn.Module):
    """`n c h w` -> `n d 2h 2w`: each pixel becomes four, by a matrix of its own for each of them."""

    def __init__(self, width: int, following: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, 4 * following, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.convolution(x), 2)


class ConvolutionalEncoder(nn.Module):
    """Images `b c H W` in [-1, 1] -> `b features`, or `b features h w` where latents are a map."""

    def __init__(self, config: ConvolutionalConfig, image_shape: tuple[int, int, int], features: int) -> None:
        super().__init__()
        channels, *image_size = image_shape
        height, width = config.lowest_size((image_size[0], image_size[1]))
        self.activation = ACTIVATIONS[config.activation]()
        self.first = nn.Conv2d(channels, config.widths[0], 3, padding=1)
        self.layers = nn.ModuleList(blocks(config, config.widths[0], self.activation))
        for before, after in pairwise(config.widths):
            self.layers.extend([Downsampling(before, after), *blocks(config, after, self.activation)])
        self.map = config.map
        self.last = (
            nn.Conv2d(config.widths[-1], features, 1)
            if config.map
            else nn.Linear(config.widths[-1] * height * width, features)
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for layer in self.layers:
            x = layer(x)
        x = self.activation(x)
        return self.last(x if self.map else x.flatten(1))


class ConvolutionalDecoder(nn.Module):
    """Latents `n *shape` -> `n o H W`."""

    def __init__(self, config: ConvolutionalConfig, shape: LatentShape, output_shape: tuple[int, int, int]) -> None:
        """shape: (d,), or (c, h, w) of the lowest resolution where latents are a map, else UserError."""
        super().__init__()
        outputs, *image_size = output_shape
        self.lowest_size = config.lowest_size((image_size[0], image_size[1]))
        self.map = config.map
        if config.map and shape[1:] != self.lowest_size:
            raise UserError(
                f"decoder.map reads latents of the lowest resolution of widths={config.widths}, which is "
                f"{'x'.join(map(str, self.lowest_size))}, and the encoder's latents have the shape {shape}: give the "
                "encoder map=True and as many widths, or the decoder map=False"
            )
        numbers = shape[0] if config.map else math.prod(shape)
        self.activation = ACTIVATIONS[config.activation]()
        self.first = (
            nn.Conv2d(numbers, config.widths[-1], 1)
            if config.map
            else nn.Linear(numbers, config.widths[-1] * math.prod(self.lowest_size))
        )
        upwards = config.widths[::-1]
        self.layers = nn.ModuleList(blocks(config, upwards[0], self.activation))
        inputs = [upwards[0]] * config.residual_blocks  # channels that each layer reads
        for before, after in pairwise(upwards):
            self.layers.extend([Upsampling(before, after), *blocks(config, after, self.activation)])
            inputs += [before] + [after] * config.residual_blocks
        self.last = nn.Conv2d(upwards[-1], outputs, 3, padding=1)
        self.skips = nn.ModuleList(
            (nn.Conv2d(numbers, channels, 1) if config.map else nn.Linear(numbers, channels))
            for channels in ([*inputs, upwards[-1]] if config.skip else [])
        )  # of each layer, the last included
        initialise(self)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents if self.map else latents.flatten(1)
        x = self.first(latents)
        x = x if self.map else x.unflatten(1, (-1, *self.lowest_size))
        for place, layer in enumerate(self.layers):
            x = layer(self.with_latents(x, latents, place))
        return self.last(self.activation(self.with_latents(x, latents, len(self.layers))))

    def with_latents(self, x: Tensor, latents: Tensor, place: int) -> Tensor:
        """What the layer at this place reads: x, plus what its skip connection says of the latents."""
        if not self.skips:
            return x
        told = self.skips[place](latents)  # n c h w, or n c
        if not self.map:
            return x + told[:, :, None, None]
        return x + F.interpolate(told, scale_factor=x.shape[-1] // told.shape[-1], mode="nearest")


def blocks(config: ConvolutionalConfig, width: int, activation: nn.Module) -> list[ResidualBlock]:
    return [ResidualBlock(width, activation) for _ in range(config.residual_blocks)]


def initialise(network: ConvolutionalEncoder | ConvolutionalDecoder) -> None:
    """So that numbers keep their size on the way, however deep the network is: a layer behind an activation has weights
    of He et al. 2015, and what L blocks add is divided by sqrt(L), as in Child 2020 (arXiv:2011.10650). The last layer
    keeps torch's smaller weights."""
    residual = [layer for layer in network.layers if isinstance(layer, ResidualBlock)]
    for block in residual:
        for convolution in (block.first, block.second):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        block.second.weight.data /= math.sqrt(len(residual))
    skips = list(getattr(network, "skips", []))
    plain = [layer.convolution for layer in network.layers if isinstance(layer, (Downsampling, Upsampling))]
    for layer in (network.first, *plain, *skips):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    for skip in skips:
        skip.weight.data /= math.sqrt(len(skips))
    for layer in (network.first, *plain, *skips, *(part for block in residual for part in (block.first, block.second))):
        nn.init.zeros_(layer.bias)
