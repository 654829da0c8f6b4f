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
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.errors import check_fields, fields_at
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.bsq import BSQConfig, BSQuantizer
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.fsq import FSQConfig, FSQuantizer
from stage1_vq.quantizers.lfq import LFQConfig, LFQuantizer
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from stage1_vq.quantizers.parts import figures_of, health_over, mean_over
from stage1_vq.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig

LAYERS: dict[str, Any] = {
    "nearest": NearestQuantizer,
    "residual": ResidualQuantizer,
    "fsq": FSQuantizer,
    "lfq": LFQuantizer,
    "bsq": BSQuantizer,
}


@dataclass(frozen=True, kw_only=True)
class GroupedQuantizerConfig:
    """A latent takes `groups` codes, or that many per layer of a residual quantizer."""

    kind: Literal["grouped"] = "grouped"
    groups: int = 2  # G, parts of equal width that the channels are split into
    layer: NearestQuantizerConfig | ResidualQuantizerConfig | FSQConfig | LFQConfig | BSQConfig = field(
        default_factory=lambda: NearestQuantizerConfig(dim=32)
    )  # of each group, layer.dim channels wide
    shared_codebook: bool = False  # one quantizer for all groups, as the heads of a multi-head one may share it
    dim: int | None = None  # d, width of z and z_q, projected to all groups and back; null: theirs, no projection

    def __post_init__(self) -> None:
        rules = [
            ("groups", self.groups >= 1, "at least 1"),
            ("dim", self.dim is None or self.dim >= 1, "at least 1, or null for that of all groups"),
        ]
        check_fields(self, rules)

    @property
    def inner_dim(self) -> int:
        """Width of all groups together."""
        if isinstance(self.layer, ResidualQuantizerConfig):
            return self.groups * (self.layer.dim or self.layer.layer.dim)
        return self.groups * self.layer.dim


class GroupedQuantizer(Quantizer):
    """z -> [1x1 convolution to inner_dim] -> G groups of neighbouring channels -> a quantizer each -> side by side
    again -> [1x1 convolution to dim] -> z_q. Losses and statistics are means over the groups.

    With a shared codebook the groups are taken for so many more images of one quantizer.
    """

    config_class = GroupedQuantizerConfig

    def __init__(self, config: GroupedQuantizerConfig) -> None:
        inner = config.inner_dim
        super().__init__(config.dim or inner)
        self.config = config
        projected = config.dim not in (None, inner)
        self.project_in = ProductConv2d(self.dim, inner) if projected else nn.Identity()
        self.project_out = ProductConv2d(inner, self.dim) if projected else nn.Identity()
        different = 1 if config.shared_codebook else config.groups
        self.layers = nn.ModuleList(LAYERS[config.layer.kind](config.layer) for _ in range(different))
        for layer in self.different():
            layer.path = f"{self.path}.layer"

    @classmethod
    def config_from(cls, values: Mapping[str, Any]) -> GroupedQuantizerConfig:
        with fields_at("layer"):
            layer = LAYERS[values["layer"]["kind"]].config_from(values["layer"])
        return super().config_from({**values, "layer": layer})

    def groups(self) -> list[Quantizer]:
        """The quantizer of each group; with a shared codebook G times the same."""
        return self.config.groups * self.different() if self.config.shared_codebook else self.different()

    def different(self) -> list[Quantizer]:
        """One for each group, or one."""
        layers: Any = list(self.layers)
        return layers

    def parts(self, z: Tensor) -> list[Tensor]:
        """What each of `different` quantizes of z, b d h w: its group, or all of them as G b images, those of an image
        side by side."""
        with float32_island(z.device.type):
            vectors = self.project_in(z.float())
        if self.config.shared_codebook:
            return [rearrange(vectors, "b (g d) h w -> (b g) d h w", g=self.config.groups)]
        return list(vectors.chunk(self.config.groups, 1))

    def of_groups(self, codes: Sequence[Codes]) -> list[Codes]:
        """The codes of each group, from those of each of `different`."""
        if not self.config.shared_codebook:
            return list(codes)
        grids = [rearrange(grid, "(b g) h w -> g b h w", g=self.config.groups) for grid in codes[0]]
        return list(zip(*grids, strict=True))

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
        found: list[Quantized] = [layer(part) for layer, part in zip(self.different(), self.parts(z), strict=True)]
        if self.config.shared_codebook:
            side_by_side = rearrange(found[0].z_q, "(b g) d h w -> b (g d) h w", g=self.config.groups)
        else:
            side_by_side = torch.cat([quantized.z_q for quantized in found], 1)
        with float32_island(z.device.type):
            z_q = self.project_out(side_by_side).to(z.dtype)
        return Quantized(
            z_q,
            self.layer_by_layer(self.of_groups([quantized.codes for quantized in found])),
            mean_over([quantized.losses for quantized in found]),
            mean_over([quantized.statistics for quantized in found]),
        )

    def codes(self, z: Tensor) -> Codes:
        self.check_latents(z)
        found = [layer.codes(part) for layer, part in zip(self.different(), self.parts(z), strict=True)]
        return self.layer_by_layer(self.of_groups(found))

    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Groups do not depend on each other, the layers of a group do."""
        self.check_latents(z)
        count, parts = self.config.groups, self.parts(z)
        if self.config.shared_codebook:
            parts = list(rearrange(parts[0], "(b g) d h w -> g b d h w", g=count))
        groups = enumerate(zip(self.groups(), parts, strict=True))
        found = [group.codes_after(part, chosen[number::count]) for number, (group, part) in groups]
        return self.layer_by_layer(found)

    def layer_by_layer(self, of_groups: Sequence[Codes]) -> Codes:
        """The codes of each group in the order of `grids`."""
        return tuple(grid for layer in zip(*of_groups, strict=True) for grid in layer)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        count = self.config.groups
        parts = [group.codes_to_latents(codes[n::count]) for n, group in enumerate(self.groups())]
        with float32_island(codes[0].device.type):
            return self.project_out(torch.cat(parts, 1))

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    def initialise(self, batches: Sequence[Tensor]) -> None:
        parts = [self.parts(z) for z in batches]
        for layer, of_layer in zip(self.different(), zip(*parts, strict=True), strict=True):
            layer.initialise(of_layer)

    def update(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """Health: `parts.health_over` the groups, or that of the one quantizer which they share."""
        if self.config.shared_codebook:
            return self.different()[0].update(steps_per_epoch)
        return health_over({f"group{n}": group.update(steps_per_epoch) for n, group in enumerate(self.groups())})

    def discard(self) -> None:
        for layer in self.different():
            layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        found: list[str] = []
        for number, layer in enumerate(self.different()):
            shared = self.config.shared_codebook
            figures = metrics if shared else figures_of(f"group{number}", metrics)
            lines = layer.warnings(figures, steps_per_epoch)
            found += lines if shared else [f"group{number}: {line}" for line in lines]
        return found
