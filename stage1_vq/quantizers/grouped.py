"""Grouped quantizer: the channels of a latent in groups, each with codebooks of its own.

Product quantization (Jegou et al. 2011, "Product quantization for nearest neighbor search"), as in wav2vec 2.0 (Baevski
et al. 2020, arXiv:2006.11477, section 2); with residual layers inside each group as in HiFi-Codec (Yang et al. 2023,
arXiv:2305.02765), or scales as in ImageFolder (Li et al. 2024, arXiv:2410.01756) and XQ-GAN (arXiv:2412.01762). G
codebooks of k vectors stand for k**G of them at the price of G * k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.errors import UserError, check_fields, fields_at
from common.float32 import float32_island
from common.wording import counted
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.bsq import BSQConfig, BSQuantizer
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.fsq import FSQConfig, FSQuantizer
from stage1_vq.quantizers.lfq import LFQConfig, LFQuantizer
from stage1_vq.quantizers.multiscale import MultiscaleQuantizer, MultiscaleQuantizerConfig
from stage1_vq.quantizers.multiscale_bits import MultiscaleBitsConfig, MultiscaleBitsQuantizer
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from stage1_vq.quantizers.parts import figures_of, health_over, mean_over
from stage1_vq.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig
from stage1_vq.quantizers.scales import ScaleQuantizer, without_last_phi

LAYERS: dict[str, Any] = {
    "nearest": NearestQuantizer,
    "residual": ResidualQuantizer,
    "fsq": FSQuantizer,
    "lfq": LFQuantizer,
    "bsq": BSQuantizer,
    "multiscale": MultiscaleQuantizer,
    "multiscale_bits": MultiscaleBitsQuantizer,
}
LayerConfig = (
    NearestQuantizerConfig
    | ResidualQuantizerConfig
    | FSQConfig
    | LFQConfig
    | BSQConfig
    | MultiscaleQuantizerConfig
    | MultiscaleBitsConfig
)


@dataclass(frozen=True, kw_only=True)
class GroupedQuantizerConfig:
    """A latent takes `groups` codes, or that many per layer of a residual quantizer; with scales in each
    group, a scale has `groups` grids."""

    kind: Literal["grouped"] = "grouped"
    groups: int = 2  # G, parts of equal width that the channels are split into
    layer: LayerConfig = field(
        default_factory=lambda: NearestQuantizerConfig(dim=32)
    )  # of each group, layer.dim channels wide
    shared_codebook: bool = False  # one quantizer for all groups, as the heads of a multi-head one may share it
    dim: int | None = None  # d, width of z and z_q, projected to all groups and back; null: theirs, no projection
    dependency_weight: float = 0.0  # of the cosine between the mean vectors of two groups: they tell different things

    def __post_init__(self) -> None:
        rules = [
            ("groups", self.groups >= 1, "at least 1"),
            ("dim", self.dim is None or self.dim >= 1, "at least 1, or null for that of all groups"),
            ("dependency_weight", self.dependency_weight >= 0, "0 (off) or more"),
            ("dependency_weight", not self.dependency_weight or self.groups >= 2, "0 where groups=1: there are no two"),
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
    again -> [1x1 convolution to dim] -> z_q. Losses and statistics are means over the groups. Quantizer dropout ends
    the sums of all groups of an image after the same layer or scale.

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
        """One per group, `group0` first; of residual layers, or scales, all groups of the first one (`depth0_group0`
        ...), then all of the next, since what comes first should matter most."""
        of_groups = [group.grids(height, width) for group in self.groups()]
        several = len(of_groups[0]) > 1
        return tuple(
            replace(grid, name=f"{grid.name}_group{number}" if several else f"group{number}")
            for layer in zip(*of_groups, strict=True)
            for number, grid in enumerate(layer)
        )

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses: those of the groups, and where it has a weight `dependency_loss`, a cosine."""
        self.check_latents(z)
        found: list[Quantized] = [
            layer(part, *drawn)
            for layer, part, drawn in zip(self.different(), self.parts(z), self.drawn(z), strict=True)
        ]
        if self.config.shared_codebook:
            side_by_side = rearrange(found[0].z_q, "(b g) d h w -> b (g d) h w", g=self.config.groups)
        else:
            side_by_side = torch.cat([quantized.z_q for quantized in found], 1)
        losses = mean_over([quantized.losses for quantized in found])
        with float32_island(z.device.type):
            if self.config.dependency_weight:
                losses["dependency_loss"] = self.config.dependency_weight * self.dependency(side_by_side.float())
            z_q = self.project_out(side_by_side).to(z.dtype)
        return Quantized(
            z_q,
            self.layer_by_layer(self.of_groups([quantized.codes for quantized in found])),
            losses,
            mean_over([quantized.statistics for quantized in found]),
        )

    def draw_kept(self, b: int, device: torch.device) -> Tensor | None:
        return self.different()[0].draw_kept(b, device)

    def drawn(self, z: Tensor) -> list[tuple[Tensor, ...]]:
        """What `forward` of each of `different` takes besides its latents: how much of it the decoder sees of each
        image, the same of all groups; or nothing."""
        kept = self.draw_kept(len(z), z.device)
        if kept is None:
            return [() for _ in self.different()]
        if self.config.shared_codebook:
            kept = kept.repeat_interleave(self.config.groups)
        return [(kept,) for _ in self.different()]

    def dependency(self, side_by_side: Tensor) -> Tensor:
        """Cosine of the mean vectors of two groups, a mean over images and pairs of groups: a scalar. XQ-GAN's, whose
        groups are two; its code takes the first and the last of more. side_by_side: b (g d) h w."""
        means = rearrange(side_by_side.mean((2, 3)), "b (g d) -> b g d", g=self.config.groups)
        unit = F.normalize(means, dim=2)
        # The sum of all cosines is the squared length of the sum; each vector's with itself is 1.
        both = unit.sum(1).square().sum(1) - unit.square().sum((1, 2))
        return both.mean() / (self.config.groups * (self.config.groups - 1))

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
        return self.side_by_side([group.codes_to_latents(codes[n::count]) for n, group in enumerate(self.groups())])

    def latents_of_first(self, codes: Codes, height: int, width: int) -> Tensor:
        count = self.config.groups
        if len(codes) % count:
            raise UserError(
                f"got codes of {counted(len(codes), 'grid')}, expected a multiple of {count}: each layer or scale of "
                f"this model has a grid for each of its {count} groups"
            )
        groups = enumerate(self.groups())
        return self.side_by_side([group.latents_of_first(codes[n::count], height, width) for n, group in groups])

    def side_by_side(self, parts: Sequence[Tensor]) -> Tensor:
        """z_q of the vectors of each group."""
        with float32_island(parts[0].device.type):
            return self.project_out(torch.cat(list(parts), 1))

    @torch.no_grad()
    def scale_latents(self) -> dict[str, Tensor] | None:
        """Of groups with scales: the code vectors side by side, k (g d), phis that know the channels of their group
        alone, and `gains`, 0 for the channels of the others. The sum of all grids is that of each group in its
        place."""
        groups = self.groups()
        parts = [group.scale_parts() if isinstance(group, ScaleQuantizer) else None for group in groups]
        known = [part for part in parts if part is not None]
        if len(known) < len(groups) or len(groups) * len(known[0]["phi_weight"]) == 1:
            return None
        count, width = len(known), known[0]["codebook"].shape[1]
        scales, device = len(known[0]["phi_weight"]), known[0]["codebook"].device
        weight = torch.zeros(scales, count, count, width, count, width, 3, 3, device=device)
        bias, gains = (torch.zeros(scales, count, count, width, device=device) for _ in range(2))
        for number, part in enumerate(known):
            weight[:, number, number, :, number] = part["phi_weight"]
            bias[:, number, number] = part["phi_bias"]
            gains[:, number, number] = part.get("gains", torch.ones(scales, width, device=device))
        return without_last_phi(
            {
                "codebook": torch.cat([part["codebook"] for part in known], 1),
                "phi_weight": rearrange(weight, "s n g d group c h w -> (s n) (g d) (group c) h w"),
                "phi_bias": rearrange(bias, "s n g d -> (s n) (g d)"),
                "gains": rearrange(gains, "s n g d -> (s n) (g d)"),
            }
        )

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    def initialise(self, batches: Sequence[Tensor]) -> None:
        parts = [self.parts(z) for z in batches]
        for layer, of_layer in zip(self.different(), zip(*parts, strict=True), strict=True):
            layer.initialise(of_layer)

    def update(self) -> None:
        for layer in self.different():
            layer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`parts.health_over` the groups, or that of the one quantizer which they share."""
        if self.config.shared_codebook:
            return self.different()[0].health(steps_per_epoch)
        return health_over({f"group{n}": group.health(steps_per_epoch) for n, group in enumerate(self.groups())})

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
