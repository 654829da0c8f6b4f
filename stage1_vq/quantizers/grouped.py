"""Grouped quantizer: the channels of a latent in groups, each with codebooks of its own.

Product quantization (Jegou et al. 2011, "Product quantization for nearest neighbor search"), as in wav2vec 2.0 (Baevski
et al. 2020, arXiv:2006.11477, section 2); with residual layers inside each group as in HiFi-Codec (Yang et al. 2023,
arXiv:2305.02765). G codebooks of k vectors stand for k**G of them at the price of G * k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stage1_vq.codes import Codes, Grid
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from stage1_vq.quantizers.parts import figures_of, health_over, mean_over
from stage1_vq.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig
from training.errors import UserError

LAYERS: dict[str, Any] = {"nearest": NearestQuantizer, "residual": ResidualQuantizer}


@dataclass(frozen=True, kw_only=True)
class GroupedQuantizerConfig:
    """A latent takes `groups` codes, or that many per layer of a residual quantizer."""

    kind: Literal["grouped"] = "grouped"
    groups: int = 2  # G, parts of equal width that the channels are split into
    layer: NearestQuantizerConfig | ResidualQuantizerConfig = field(
        default_factory=lambda: NearestQuantizerConfig(dim=32)
    )  # of each group, layer.dim channels wide

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise UserError(f"model.quantizer.groups={self.groups}, expected at least 1")

    @property
    def dim(self) -> int:
        """d, width of z and z_q."""
        if isinstance(self.layer, ResidualQuantizerConfig):
            return self.groups * (self.layer.dim or self.layer.layer.dim)
        return self.groups * self.layer.dim


class GroupedQuantizer(Quantizer):
    """z -> G groups of neighbouring channels -> a quantizer each -> side by side again: z_q. Losses and statistics are
    means over the groups."""

    config_class = GroupedQuantizerConfig

    def __init__(self, config: GroupedQuantizerConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        self.layers = nn.ModuleList(LAYERS[config.layer.kind](config.layer) for _ in range(config.groups))

    @classmethod
    def config_from(cls, values: Mapping[str, Any]) -> GroupedQuantizerConfig:
        layer = values["layer"]
        return super().config_from({**values, "layer": LAYERS[layer["kind"]].config_from(layer)})

    def groups(self) -> list[Quantizer]:
        groups: Any = list(self.layers)
        return groups

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One per group, `group0` first; of residual layers all groups of the first one (`depth0_group0` ...), then all
        of the next, since what comes first should matter most."""
        of_groups = [group.grids(height, width) for group in self.groups()]
        several = len(of_groups[0]) > 1
        return tuple(
            replace(grid, name=f"{grid.name}_group{number}" if several else f"group{number}")
            for layer in zip(*of_groups, strict=True)
            for number, grid in enumerate(layer)
        )

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w."""
        self.check_latents(z)
        found: list[Quantized] = [
            group(part) for group, part in zip(self.groups(), z.chunk(self.config.groups, 1), strict=True)
        ]
        return Quantized(
            torch.cat([quantized.z_q for quantized in found], 1),
            self.layer_by_layer([quantized.codes for quantized in found]),
            mean_over([quantized.losses for quantized in found]),
            mean_over([quantized.statistics for quantized in found]),
        )

    def codes(self, z: Tensor) -> Codes:
        self.check_latents(z)
        parts = z.chunk(self.config.groups, 1)
        return self.layer_by_layer([group.codes(part) for group, part in zip(self.groups(), parts, strict=True)])

    def layer_by_layer(self, of_groups: Sequence[Codes]) -> Codes:
        """The codes of each group in the order of `grids`."""
        return tuple(grid for layer in zip(*of_groups, strict=True) for grid in layer)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        count = self.config.groups
        return torch.cat([group.codes_to_latents(codes[n::count]) for n, group in enumerate(self.groups())], 1)

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    def initialise(self, batches: Sequence[Tensor]) -> None:
        parts = [z.chunk(self.config.groups, 1) for z in batches]
        for group, of_group in zip(self.groups(), zip(*parts, strict=True), strict=True):
            group.initialise(of_group)

    def update(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """Health: `parts.health_over` the groups."""
        return health_over({f"group{n}": group.update(steps_per_epoch) for n, group in enumerate(self.groups())})

    def discard(self) -> None:
        for group in self.groups():
            group.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        found: list[str] = []
        for number, group in enumerate(self.groups()):
            for line in group.warnings(figures_of(f"group{number}", metrics), steps_per_epoch):
                found.append(f"group{number}: {line.replace('model.quantizer.', 'model.quantizer.layer.')}")
        return found
