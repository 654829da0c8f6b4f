"""A decoder that says the pixels of an image in a few interleaved grids, one after the other, as Reed et al. 2017 do
("Parallel Multiscale Autoregressive Density Estimation", arXiv:1703.03664):

    every 2**levels-th pixel of every 2**levels-th row, given z; then, again and again, the three grids that lie between
    the pixels that are known, diagonal neighbours first, each given z and all pixels before it.

It takes 1 + 3 * levels passes of small networks for an image of any size, where a PixelCNN takes one for each pixel,
and leaves to z what no neighbour tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import check_fields
from stage1_vae.decoders.base import Decoder
from stage1_vae.likelihoods import Likelihood
from stage1_vae.networks.convolutional import (
    ACTIVATIONS,
    ConvolutionalConfig,
    ConvolutionalDecoder,
    ResidualBlock,
)
from stage1_vae.posteriors.base import LatentShape

BETWEEN = ((1, 1), (0, 1), (1, 0))  # rows and columns by which the three grids of a level are moved, in their order


@dataclass(frozen=True, kw_only=True)
class InterleavedConfig:
    """Grids of pixels, each given those before it."""

    kind: Literal["interleaved"] = "interleaved"
    levels: int = 2  # times that the grid of known pixels doubles along both sides
    width: int = 32  # channels of the network of each grid
    residual_blocks: int = 2  # of the network of each grid
    trunk_widths: tuple[int, ...] = (
        64,
    )  # channels between z and the coarsest grid: at its resolution, at half of it ...
    trunk_blocks: int = 2  # residual ones, at each of these resolutions
    activation: Literal["relu", "elu", "silu"] = "silu"
    map: bool = False  # latents are a map of the lowest of these resolutions, not one vector

    def __post_init__(self) -> None:
        object.__setattr__(self, "trunk_widths", tuple(self.trunk_widths))
        check_fields(
            self,
            [
                ("levels", self.levels >= 1, "at least 1"),
                ("width", self.width >= 1, "at least 1"),
                ("residual_blocks", self.residual_blocks >= 0, "0 or more"),
            ],
        )

    @property
    def trunk(self) -> ConvolutionalConfig:
        return ConvolutionalConfig(
            widths=self.trunk_widths, residual_blocks=self.trunk_blocks, activation=self.activation, map=self.map
        )


class Grid(NamedTuple):
    """Pixels of an image: each `step`-th from a row and a column on."""

    row: int
    column: int
    step: int

    def of(self, images: Tensor) -> Tensor:
        """`... H W` -> `... h w`, a view."""
        return images[..., self.row :: self.step, self.column :: self.step]


def grids(levels: int) -> list[Grid]:
    """All grids, in the order in which they are said; together they are the image."""
    found = [Grid(0, 0, 2**levels)]
    for level in reversed(range(levels)):
        step = 2**level
        found += [Grid(row * step, column * step, 2 * step) for row, column in BETWEEN]
    return found


class GridNetwork(nn.Module):
    """Channels `n i h w` -> what is found, `n width h w`, and the likelihood's parameters, `n o h w`."""

    def __init__(self, inputs: int, outputs: int, config: InterleavedConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]()
        self.first = nn.Conv2d(inputs, config.width, 3, padding=1)
        blocks = [ResidualBlock(config.width, self.activation) for _ in range(config.residual_blocks)]
        self.layers = nn.ModuleList(blocks)
        self.last = nn.Conv2d(config.width, outputs, 1)
        for block in blocks:
            for convolution in (block.first, block.second):
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                assert convolution.bias is not None
                nn.init.zeros_(convolution.bias)
            block.second.weight.data /= config.residual_blocks**0.5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        x = self.activation(x)
        return x, self.last(x)


class InterleavedDecoder(Decoder):
    """p(x|z) as a product over the grids."""

    def __init__(
        self, config: InterleavedConfig, likelihood: Likelihood, shape: LatentShape, image_size: tuple[int, int]
    ) -> None:
        """image_size: (H, W), multiples of 2**levels times what the trunk halves; else UserError."""
        super().__init__()
        stride = 2**config.levels
        check_fields(
            config,
            [("levels", not any(side % stride for side in image_size), f"such that 2**levels divides {image_size}")],
        )
        self.config, self.likelihood, self.image_size = config, likelihood, image_size
        self.discrete = likelihood.discrete
        self.grids = grids(config.levels)
        coarsest = (config.width, image_size[0] // stride, image_size[1] // stride)
        self.trunk = ConvolutionalDecoder(config.trunk, shape, coarsest)
        channels, outputs = likelihood.channels, likelihood.outputs
        self.networks = nn.ModuleList([GridNetwork(config.width, outputs, config)])
        for _ in range(config.levels):
            known = (channels, 2 * channels, 3 * channels)
            self.networks.extend(GridNetwork(config.width + more, outputs, config) for more in known)
        # From what the last grid of a level found to what the next level begins with, at twice its sides.
        self.finer = nn.ModuleList(nn.Conv2d(config.width, 4 * config.width, 1) for _ in range(config.levels - 1))

    def walk(self, latents: Tensor, choose: Callable[[Grid, Tensor], Tensor]) -> Tensor:
        """The images, n c H W, whose pixels `choose` gives grid after grid: (the grid, the likelihood's parameters
        there, n o h w) -> n c h w. latents: n *shape."""
        images = torch.empty(len(latents), self.likelihood.channels, *self.image_size, device=latents.device)
        found = self.trunk(latents)
        state = found
        for number, (grid, network) in enumerate(zip(self.grids, self.networks, strict=True)):
            place = (number - 1) % 3  # among the three of a level
            if number and place == 0:
                if number > 1:
                    state = F.pixel_shuffle(self.finer[number // 3 - 1](found), 2)
                known = [Grid(0, 0, grid.step).of(images)]
            inputs = torch.cat([state, *known], dim=1) if number else state
            found, outputs = network(inputs)
            pixels = choose(grid, outputs.float())
            grid.of(images).copy_(pixels)
            if number:
                known.append(pixels)
        return images

    def log_likelihood(self, latents: Tensor, images: Tensor) -> Tensor:
        draws, batch = latents.shape[:2]
        parts: list[Tensor] = []

        def given(grid: Grid, outputs: Tensor) -> Tensor:
            pixels = grid.of(images)
            parts.append(self.likelihood.log_prob(outputs.unflatten(0, (draws, batch)), pixels))
            return pixels.expand(draws, *pixels.shape).flatten(0, 1)

        self.walk(latents.flatten(0, 1), given)
        return torch.stack(parts).sum(0)

    def mean(self, latents: Tensor) -> Tensor:
        """Each pixel's mean given the means of those before it."""
        return self.walk(latents, lambda _, outputs: self.likelihood.mean(outputs))

    def mode(self, latents: Tensor) -> Tensor:
        return self.walk(latents, lambda _, outputs: self.likelihood.mode(outputs))

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.walk(latents, lambda _, outputs: self.likelihood.sample(outputs, generator))
