"""The decoder of spatial-VAE: Bepler et al. 2019, "Explicitly disentangling image content from translation and rotation
with spatial-VAE" (arXiv:1909.11663).

A pixel is a function of its place and of the content z. The first numbers of the latents turn and shift the places:

    place' = place R(theta) + shift,   theta = angle_scale z_1,   shift = shift_scale (z_2, z_3)

so that under the prior N(0, I) of all latents theta is N(0, angle_scale^2) on the real line. Places are turned
counter-clockwise before they are looked up, so the image is turned clockwise by theta. A divergence between Gaussians
does not change with their unit: KL(q(theta|x) || N(0, s^2)) is that of z_1 to N(0, 1). With mean m and scale t of theta
it is log(s / t) + (t^2 + m^2) / (2 s^2) - 1/2: as s grows, m costs nothing any more, and what is left is
-log t, but for a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError, check_fields
from stage1_vae.posteriors.base import LatentShape

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


@dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """A network of `hidden` units in each of `layers` layers, which reads one place, and the content, at a time."""

    kind: Literal["spatial"] = "spatial"
    hidden: int = 500
    layers: int = 2
    activation: Literal["tanh", "relu", "leaky_relu"] = "tanh"
    rotation: bool = True  # the first number of the latents is an angle
    translation: bool = True  # the next two are a shift
    angle_scale: float = math.pi / 4  # radians: standard deviation of the angle's prior
    shift_scale: float = 0.1  # standard deviation of the shift's prior, where the image's longer side is 2
    squares: bool = False  # the network reads x^2, y^2 and x y of a place as well
    bilinear: bool = False  # places and content meet in products, too
    residual: bool = False  # layers after the first add what they read

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("hidden", self.hidden >= 1, "at least 1"),
                ("layers", self.layers >= 1, "at least 1"),
                ("activation", self.activation in ACTIVATIONS, ", ".join(ACTIVATIONS)),
                ("angle_scale", self.angle_scale > 0, "above 0"),
                ("shift_scale", self.shift_scale > 0, "above 0"),
            ],
        )

    @property
    def moves(self) -> int:
        """How many of the first numbers of the latents move the image."""
        return int(self.rotation) + 2 * int(self.translation)


class SpatialDecoder(nn.Module):
    """Latents `n d` -> `n o H W`."""

    grid: Tensor

    def __init__(self, config: SpatialConfig, shape: LatentShape, output_shape: tuple[int, int, int]) -> None:
        super().__init__()
        content = math.prod(shape) - config.moves
        if len(shape) > 1 or content < 1:
            raise UserError(
                f"model.decoder.kind=spatial with latents of shape {shape}, expected a vector of at least "
                f"{config.moves + 1} numbers: the first {config.moves} move the image, the others are its content; "
                "give more --model.latents, and an encoder without a map"
            )
        outputs, height, width = output_shape
        self.config, self.size = config, (height, width)
        places = 5 if config.squares else 2
        self.of_places = nn.Linear(places, config.hidden)
        self.of_content = nn.Linear(content, config.hidden, bias=False)
        self.of_both = nn.Bilinear(places, content, config.hidden, bias=False) if config.bilinear else None
        self.layers = nn.ModuleList(nn.Linear(config.hidden, config.hidden) for _ in range(config.layers - 1))
        self.last = nn.Linear(config.hidden, outputs)
        self.activation = ACTIVATIONS[config.activation]()
        self.register_buffer("grid", places_of(height, width), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        moves, content = latents[:, : self.config.moves], latents[:, self.config.moves :]
        hidden = self.activation(self.first(self.moved(moves), content))
        for layer in self.layers:
            told = layer(hidden)
            hidden = self.activation(told + hidden if self.config.residual else told)
        return self.last(hidden).transpose(1, 2).unflatten(2, self.size)

    def first(self, places: Tensor, content: Tensor) -> Tensor:
        """n p 2 or, where all images have the same places, 1 p 2, and n d -> n p h"""
        if self.config.squares:
            x, y = places.unbind(-1)
            places = torch.stack([x, y, x.square(), y.square(), x * y], dim=-1)
        hidden = self.of_places(places) + self.of_content(content).unsqueeze(1)
        if self.of_both is None:
            return hidden
        weights = torch.einsum("hpd,nd->nph", self.of_both.weight, content)
        return hidden + places @ weights

    def moved(self, moves: Tensor) -> Tensor:
        """The places of all pixels, turned and shifted: n m -> n p 2, or 1 p 2 where nothing moves."""
        places, config = self.grid.to(moves.dtype).unsqueeze(0), self.config
        if config.rotation:
            angle = config.angle_scale * moves[:, 0]
            cosine, sine = angle.cos(), angle.sin()
            turn = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], -2)  # n 2 2
            places = places @ turn
        if config.translation:
            places = places + config.shift_scale * moves[:, None, -2:]
        return places


def places_of(height: int, width: int) -> Tensor:
    """(x, y) of the centres of an image's pixels, row by row, p 2: along the longer side from -1 to 1, and as far apart
    along the other, about 0; x to the right, y upwards. So a turn of places is one of the image."""
    longer = max(height, width)
    across, up = (1.0 if side == longer else (side - 1) / (longer - 1) for side in (width, height))
    y, x = torch.meshgrid(torch.linspace(up, -up, height), torch.linspace(-across, across, width), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
