"""Fully connected networks between images and latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.posteriors.base import LatentShape

Activation = Literal["relu", "leaky_relu", "tanh", "elu", "silu", "softplus"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # of what a linear layer made, which nothing else reads
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Layers of `hidden` units, each with its activation, and a last linear one. The encoder reads pixels in [0, 1]."""

    kind: Literal["dense"] = "dense"
    hidden: tuple[int, ...] = (500,)  # units of each hidden layer; none: linear
    activation: Activation = "relu"
    skip: bool = False  # of a decoder: every layer after the first reads the latents too (Dieng et al. 2018, Skip-VAE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if any(units < 1 for units in self.hidden):
            raise UserError(f"hidden={self.hidden}, expected numbers of units of at least 1, or none")


class DenseLayers(nn.Module):
    """`n inputs` -> `n outputs`."""

    def __init__(self, inputs: int, outputs: int, config: DenseConfig) -> None:
        super().__init__()
        self.skip = config.skip
        sizes = [inputs, *config.hidden, outputs]
        more = inputs if config.skip else 0
        self.layers = nn.ModuleList(
            nn.Linear(size + (more if place else 0), following)
            for place, (size, following) in enumerate(pairwise(sizes))
        )
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for place, layer in enumerate(self.layers):
            if place:
                hidden = self.activation(hidden)
                hidden = torch.cat([hidden, x], dim=-1) if self.skip else hidden
            hidden = layer(hidden)
        return hidden


class DenseEncoder(nn.Module):
    """Images `b c H W` in [-1, 1] -> `b features`."""

    def __init__(self, config: DenseConfig, image_shape: tuple[int, int, int], features: int) -> None:
        super().__init__()
        self.layers = DenseLayers(math.prod(image_shape), features, config)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images.flatten(1) + 1) / 2)


class DenseDecoder(nn.Module):
    """Latents `n *shape` -> `n o H W`."""

    def __init__(self, config: DenseConfig, shape: LatentShape, output_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.output_shape = output_shape
        self.layers = DenseLayers(math.prod(shape), math.prod(output_shape), config)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents.flatten(1)).unflatten(1, self.output_shape)
