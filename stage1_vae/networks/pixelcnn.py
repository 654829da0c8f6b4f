"""A gated PixelCNN over the pixels of images (van den Oord et al. 2016, arXiv:1606.05328), conditioned on latents as in
Gulrajani et al. 2017, "PixelVAE" (arXiv:1611.05013).

Two stacks of convolutions see what lies before a pixel in raster order and nothing after it. The vertical stack sees
the rows above, the horizontal one what is left of the pixel in its own row. Inputs are moved once, down and right;
kernels then end at the current row and column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.networks.convolutional import ConvolutionalConfig
from stage1_vae.networks.dense import DenseConfig


@dataclass(frozen=True, kw_only=True)
class PixelCNNDecoderConfig:
    """Each pixel given the latents and the pixels before it. The less of those it sees (few layers, small kernels), the
    more it needs the latents: decoders that see everything tend to ignore them (Chen et al. 2017, arXiv:1611.02731)."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    layers: int = 4
    width: int = 32  # channels of both stacks
    first_kernel_size: int = 7  # of the first layer, which sees the pixels
    kernel_size: int = 3  # of all other layers
    output_width: int = 64  # channels between the horizontal stack and the outputs
    network: DenseConfig | ConvolutionalConfig = field(default_factory=ConvolutionalConfig)  # latents to features
    features: int = 16  # channels that it makes of the latents at each pixel, which shift the gates of every layer

    def __post_init__(self) -> None:
        for name in ("layers", "width", "output_width", "features"):
            if getattr(self, name) < 1:
                raise UserError(f"decoder.{name}={getattr(self, name)}, expected at least 1")
        for name in ("first_kernel_size", "kernel_size"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise UserError(f"decoder.{name}={getattr(self, name)}, expected an odd number of at least 3")

    @property
    def reach(self) -> int:
        """Columns to the right that a pixel sees in the rows above; to the left, and upwards, it sees one more."""
        return self.first_kernel_size // 2 + (self.layers - 1) * (self.kernel_size // 2)


def gate(x: Tensor) -> Tensor:
    """tanh of one half of the channels times sigmoid of the other."""
    signal, opening = x.chunk(2, dim=1)
    return signal.tanh() * opening.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks."""

    def __init__(self, channels: int, width: int, kernel_size: int, features: int, residual: bool) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        self.residual = residual
        self.vertical = nn.Conv2d(channels, 2 * width, (self.reach + 1, kernel_size), bias=False)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.horizontal = nn.Conv2d(channels, 2 * width, (1, self.reach + 1), bias=False)
        self.out = nn.Conv2d(width, width, 1)
        self.condition = nn.Conv2d(features, 4 * width, 1)  # of both gates

    def above(self, vertical: Tensor) -> Tensor:
        """What the rows up to each say, before the gate: n c h w -> n 2d h w."""
        return self.vertical(F.pad(vertical, (self.reach, self.reach, self.reach, 0)))

    def along(self, horizontal: Tensor, told: Tensor) -> Tensor:
        """The horizontal stack: n c h w, and what it is told of the rows above and of the latents, n 2d h w,
        -> n d h w."""
        new = self.out(gate(self.horizontal(F.pad(horizontal, (self.reach, 0, 0, 0))) + told))
        return horizontal + new if self.residual else new


class PixelCNNNetwork(nn.Module):
    """What is said of each pixel, `n o H W`, given features `n f H W` and the pixels before it."""

    def __init__(self, config: PixelCNNDecoderConfig, channels: int, outputs: int) -> None:
        super().__init__()
        self.channels = channels
        self.reach = config.reach
        self.layers = nn.ModuleList(
            GatedLayer(
                config.width if place else channels + 1,
                config.width,
                config.kernel_size if place else config.first_kernel_size,
                config.features,
                residual=place > 0,
            )
            for place in range(config.layers)
        )
        self.hidden = nn.Conv2d(config.width, config.output_width, 1)
        self.last = nn.Conv2d(config.output_width, outputs, 1)

    @property
    def gated_layers(self) -> list[GatedLayer]:
        return cast("list[GatedLayer]", list(self.layers))

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        """Of all pixels of images `n c H W` in one pass."""
        seen = with_ones(images)
        vertical, horizontal = F.pad(seen, (0, 0, 1, -1)), F.pad(seen, (1, -1))
        for layer in self.gated_layers:
            for_vertical, for_horizontal = layer.condition(features).chunk(2, dim=1)
            above = layer.above(vertical)
            horizontal = layer.along(horizontal, layer.vertical_to_horizontal(above) + for_horizontal)
            vertical = gate(above + for_vertical)
        return self.outputs(horizontal)

    def outputs(self, horizontal: Tensor) -> Tensor:
        return self.last(self.hidden(horizontal.relu()).relu())

    @torch.no_grad()
    def generate(self, features: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Images `n c H W`, one pixel after the other. choose: what is said of a pixel, `n o 1 1`, -> its value,
        `n c 1 1`.

        The vertical stack is computed once for a row, of as many rows above as it sees, and the horizontal one for each
        pixel, of as many columns as it sees: what lies at the edge of such a part is computed from too little, and
        nothing that the pixel sees lies there.
        """
        n, _, H, W = features.shape
        images = features.new_zeros(n, self.channels, H, W)
        conditions = [layer.condition(features).chunk(2, dim=1) for layer in self.gated_layers]
        for row in range(H):
            top = max(0, row - self.reach)
            vertical = F.pad(with_ones(images), (0, 0, 1, -1))[:, :, top : row + 1]
            told = []  # to the horizontal stack of each layer, n 2d 1 W
            for layer, (for_vertical, for_horizontal) in zip(self.gated_layers, conditions, strict=True):
                above = layer.above(vertical)
                told.append(layer.vertical_to_horizontal(above[:, :, -1:]) + for_horizontal[:, :, row : row + 1])
                vertical = gate(above + for_vertical[:, :, top : row + 1])
            for column in range(W):
                part = slice(max(0, column - self.reach), column + 1)
                horizontal = F.pad(with_ones(images[:, :, row : row + 1]), (1, -1))[..., part]
                for layer, of_row in zip(self.gated_layers, told, strict=True):
                    horizontal = layer.along(horizontal, of_row[..., part])
                chosen = choose(self.outputs(horizontal[..., -1:]).float())
                images[:, :, row : row + 1, column : column + 1] = chosen
        return images


def with_ones(images: Tensor) -> Tensor:
    """A channel more, which tells grey from what lies outside."""
    return torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
