"""Residual layers of FSQ or LFQ, each with a finer grid than the one before and by choice a rotation of its own.

Layers as in SoundStream (Zeghidour et al. 2021, arXiv:2107.03312), with finite scalars in the place of codebooks as in
vector-quantize-pytorch. What a layer leaves lies in a small cube, and is described by the same cube made smaller: by L
for FSQ of L levels, by 2 for the signs of LFQ. A rotation before each layer (Chee et al. 2023, arXiv:2307.13304) keeps
the layers from cutting along the same axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.errors import FieldError, check_fields, fields_at
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.fsq import FSQConfig, FSQuantizer
from stage1_vq.quantizers.lfq import LFQConfig, LFQuantizer
from stage1_vq.quantizers.parts import figures_of, health_over, mean_over

LAYERS: dict[str, Any] = {"fsq": FSQuantizer, "lfq": LFQuantizer}


@dataclass(frozen=True, kw_only=True)
class ResidualScalarConfig:
    """A latent takes `depth` codes. A rotation for each layer: layer.orthogonal_rotation=true."""

    kind: Literal["residual_scalar"] = "residual_scalar"
    depth: int = 2  # D, layers that add up to a latent
    layer: FSQConfig | LFQConfig = field(
        default_factory=lambda: FSQConfig(levels=(5, 5, 5, 5), dim=4, preserve_symmetry=True)
    )  # the first one; those after it have its grid, and each a finer one
    dim: int | None = None  # d, width of z and z_q, projected to layer.dim and back; null: layer.dim, no projection

    def __post_init__(self) -> None:
        rules = [
            ("depth", self.depth >= 1, "at least 1"),
            ("dim", self.dim is None or self.dim >= 1, "at least 1, or null for layer.dim"),
        ]
        check_fields(self, rules)
        layer = self.layer
        numbers = len(layer.levels) if isinstance(layer, FSQConfig) else layer.bits
        if layer.dim != numbers:
            raise FieldError(self, "layer.dim", f"{numbers}, its numbers: residuals are left in their space; give dim")
        if isinstance(layer, LFQConfig) and layer.factorized_bits is not None:
            raise FieldError(self, "layer.factorized_bits", "none: the grids of this quantizer are its layers")
        if isinstance(layer, FSQConfig) and not layer.preserve_symmetry:
            raise FieldError(self, "layer.preserve_symmetry", "True: what a layer leaves lies on both sides of a level")


class ResidualScalarQuantizer(Quantizer):
    """z -> [1x1 convolution to layer.dim] -> [FSQ: into its cube by tanh] -> r; r_1 = r, e_i of r_i on the grid of
    layer i, r_i+1 = r_i - e_i; e_1 + ... + e_D -> [1x1 convolution to dim] -> z_q.

    Each layer passes its gradient to its residual, and these add up at r. Losses are means over the layers.
    """

    config_class = ResidualScalarConfig
    scales: Tensor  # D numbers 1 1: of the grid of each layer

    def __init__(self, config: ResidualScalarConfig) -> None:
        first = config.layer
        super().__init__(config.dim or first.dim)
        self.config = config
        projected = config.dim not in (None, first.dim)
        self.project_in = ProductConv2d(self.dim, first.dim) if projected else nn.Identity()
        self.project_out = ProductConv2d(first.dim, self.dim) if projected else nn.Identity()
        if isinstance(first, FSQConfig):
            layers: list[Any] = [replace(first, bound="clamp") for _ in range(config.depth)]
            levels = torch.tensor(first.levels, dtype=torch.float32)
            scales = torch.stack([levels**-number for number in range(config.depth)])
            self.limit: Tensor | None = (1 + 1 / (levels - 1)).view(-1, 1, 1)
        else:
            # Its losses know of corners, and so it gets these smaller itself.
            layers = [shrunk(first, 2.0**-number) for number in range(config.depth)]
            scales = torch.ones(config.depth, first.bits)
            self.limit = None
        self.layers = nn.ModuleList(LAYERS[first.kind](layer) for layer in layers)
        self.register_buffer("scales", scales.view(config.depth, -1, 1, 1), persistent=False)
        for layer in self.stack():
            layer.path = f"{self.path}.layer"

    @classmethod
    def config_from(cls, values: Mapping[str, Any]) -> ResidualScalarConfig:
        with fields_at("layer"):
            layer = LAYERS[values["layer"]["kind"]].config_from(values["layer"])
        return super().config_from({**values, "layer": layer})

    def stack(self) -> list[Any]:
        return list(self.layers)

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One per layer, `depth0` first."""
        found = [layer.grids(height, width)[0] for layer in self.stack()]
        return tuple(replace(grid, name=f"depth{number}") for number, grid in enumerate(found))

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses: those of the layers, averaged; statistics: `quantization_error`, the squared error per
        number that all layers together leave."""
        with float32_island(z.device.type):
            residual = self.narrow(z)
            total, found = torch.zeros_like(residual), []
            for layer, scale in zip(self.stack(), self.scales, strict=True):
                found.append(layer(residual / scale))
                described = found[-1].z_q * scale
                residual, total = residual - described.detach(), total + described
            return Quantized(
                self.project_out(total).to(z.dtype),
                tuple(quantized.codes[0] for quantized in found),
                mean_over([quantized.losses for quantized in found]),
                {"quantization_error": residual.detach().square().mean()},
            )

    def narrow(self, z: Tensor) -> Tensor:
        """b numbers h w: the first residual."""
        self.check_latents(z)
        numbers = self.project_in(z.float())
        if self.limit is None:
            return numbers
        limit = self.limit.to(numbers.device)
        return limit * torch.tanh(numbers / limit)

    def codes(self, z: Tensor) -> Codes:
        return self.codes_after(z, ())

    @torch.no_grad()
    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Each layer describes what the ones before it, as they were chosen, leave of z."""
        with float32_island(z.device.type):
            residual = self.narrow(z)
            found: list[Tensor] = []
            for number, (layer, scale) in enumerate(zip(self.stack(), self.scales, strict=True)):
                found.append(chosen[number] if number < len(chosen) else layer.codes(residual / scale)[0])
                residual = residual - layer.codes_to_latents((found[-1],)) * scale
        return tuple(found)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        layers = zip(self.stack(), self.scales, codes, strict=True)
        with float32_island(codes[0].device.type):
            parts = [layer.codes_to_latents((grid,)) * scale for layer, scale, grid in layers]
            return self.project_out(torch.stack(parts).sum(0))

    def update(self) -> None:
        for layer in self.stack():
            layer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`parts.health_over` the layers."""
        return health_over({f"depth{n}": layer.health(steps_per_epoch) for n, layer in enumerate(self.stack())})

    def discard(self) -> None:
        for layer in self.stack():
            layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        return [
            f"depth{number}: {line}"
            for number, layer in enumerate(self.stack())
            for line in layer.warnings(figures_of(f"depth{number}", metrics), steps_per_epoch)
        ]


def shrunk(layer: LFQConfig, by: float) -> LFQConfig:
    clamp = None if layer.soft_clamp is None else layer.soft_clamp * by
    return replace(layer, corner=layer.corner * by, soft_clamp=clamp)
