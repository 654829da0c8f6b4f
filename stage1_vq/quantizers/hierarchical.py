"""Hierarchical quantizer: the scales of VAR (Tian et al. 2024, arXiv:2404.02905, section 3.2), trained end to end
through all of them, as HierarchicalVQ of vector-quantize-pytorch 1.32.

VAR passes the gradient straight from the last sum to the latents and teaches its convolutions by a loss of their own.
Here each scale passes it to what it described, through the scales before it, so that the convolutions learn from the
decoder; up-sampling is bilinear, and each scale may have a codebook of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Grid
from common.errors import check_fields, fields_at
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.codebook import Codebook, look_up
from stage1_vq.quantizers.gradients import pass_gradient
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig, lookup_losses
from stage1_vq.quantizers.parts import figures_of, health_over, mean_over
from stage1_vq.quantizers.residual import check_residual_layer
from stage1_vq.quantizers.scales import ScaleQuantizer, phi_convolutions, scale_rules
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class HierarchicalQuantizerConfig:
    """The package's own settings are layer.commitment_weight=1 and these."""

    kind: Literal["hierarchical"] = "hierarchical"
    scales: tuple[int, ...] = (1, 2, 3, 4, 6, 8)  # sides of the grids, coarse to fine: the last is h = w
    layer: NearestQuantizerConfig = field(default_factory=NearestQuantizerConfig)  # how a code is found; layer.dim is d
    codebook_sizes: tuple[int, ...] = ()  # of each scale, where they differ; empty: layer.codebook_size
    shared_codebook: bool = True  # one codebook for all scales
    phis: int = 1  # 3x3 convolutions after up-sampling, each shared by neighbouring scales
    phi_share: float = 0.5  # of the convolution in what phi adds; the rest is the up-sampled map itself
    quantizer_dropout: float = 0.0  # share of training images whose z_q ends after a random number of scales
    fewest_scales: int = 1  # that quantizer_dropout leaves

    def __post_init__(self) -> None:
        sizes, count = self.codebook_sizes, len(self.scales)
        rules = [
            *scale_rules(self, list(range(1, count + 1))),
            ("codebook_sizes", not sizes or len(sizes) == count, f"one for each of the {count} scales"),
            ("codebook_sizes", all(size >= 2 for size in sizes), "at least 2 each: one code carries no bits"),
            ("codebook_sizes", not (sizes and self.shared_codebook), "none where shared_codebook=true"),
        ]
        check_fields(self, rules)
        check_residual_layer(self)


class HierarchicalQuantizer(ScaleQuantizer):
    """With f the latents, and from scale 1 to S of them:

        rest = area-average of f - sum, on the grid of scale s
        codes_s = nearest(rest); e = code vectors, whose gradient passes to rest
        sum = sum + phi_s(bilinear up-sampling of e)

    z_q is the last sum, or with quantizer dropout that after some scale. Losses are those of the scales, averaged. All
    of it in float32.
    """

    config_class = HierarchicalQuantizerConfig
    config: HierarchicalQuantizerConfig
    upsampling = "bilinear"

    def __init__(self, config: HierarchicalQuantizerConfig) -> None:
        d, count = config.layer.dim, len(config.scales)
        super().__init__(config, d, d, evenly_over_scales(count, config.phis))
        sizes = config.codebook_sizes or count * (config.layer.codebook_size,)
        different = sizes[:1] if config.shared_codebook else sizes
        self.layers = nn.ModuleList(Codebook(config.layer.codebook_settings(size)) for size in different)
        self.phis = phi_convolutions(d, config.phis)

    @classmethod
    def config_from(cls, values: Mapping[str, Any]) -> HierarchicalQuantizerConfig:
        with fields_at("layer"):
            layer = NearestQuantizer.config_from(values["layer"])
        return super().config_from({**values, "layer": layer})

    def stack(self) -> list[Codebook]:
        """The codebook of each scale; with a shared one S times the same."""
        layers: Any = list(self.layers)
        return len(self.config.scales) * layers if self.config.shared_codebook else layers

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One per scale, `scale0` first."""
        scales = zip(self.stack(), self.sizes(height, width), strict=True)
        return tuple(Grid(f"scale{n}", h, w, layer.settings.size) for n, (layer, (h, w)) in enumerate(scales))

    def nearest(self, rest: Tensor, number: int) -> Tensor:
        return self.stack()[number].codes(rest)

    def vectors(self, codes: Tensor, number: int) -> Tensor:
        return self.stack()[number].look_up(codes)

    def forward(self, z: Tensor, kept: Tensor | None = None) -> Quantized:
        """z: b d h w; kept: as `draw_kept` draws it, None: drawn here. Losses: those of the scales, averaged;
        statistics: `quantization_error`, the squared error per element that all scales together leave."""
        self.check_latents(z)
        kept = self.draw_kept(len(z), z.device) if kept is None else kept
        layer_config = self.config.layer
        with float32_island(z.device.type):
            latents = z.float()
            total = torch.zeros_like(latents)
            found: list[Tensor] = []
            sums: list[Tensor] = []
            losses: list[dict[str, Tensor]] = []
            for number, (layer, size) in enumerate(zip(self.stack(), self.sizes(*z.shape[2:]), strict=True)):
                rest, vectors = self.shrink(latents - total, number, size), layer.code_vectors()
                found.append(layer.nearest(rest.detach(), vectors.detach(), note=self.training))
                nearest = look_up(found[-1], vectors.detach())
                error = squared_error(rest, nearest)
                losses.append(lookup_losses(layer_config, rest, error, found[-1], vectors, training=self.training))
                total = total + self.grown(pass_gradient(layer_config.gradient, rest, nearest), number, z.shape[2:])
                sums.append(total)
            if self.config.shared_codebook and self.training:
                self.stack()[0].join_calls(len(found), len(z))
            statistics = {"quantization_error": squared_error(total.detach(), latents.detach())}
            z_q = self.seen_by_decoder(sums, kept).to(z.dtype)
            return Quantized(z_q, tuple(found), mean_over(losses), statistics)

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means scale by scale, each over what the ones before it leave; a shared codebook over the latents, and then
        over what each scale has to describe under the codebook which that gives."""
        if not self.config.layer.kmeans_iterations:
            return
        with float32_island(batches[0].device.type):
            latents = [z.float() for z in batches]
            if self.config.shared_codebook:
                self.stack()[0].initialise(latents)
                self.stack()[0].initialise([rows_of(self.walk(z)[0]) for z in latents])
                return
            for number, layer in enumerate(self.stack()):
                layer.initialise([rows_of(self.walk(z)[0][number : number + 1]) for z in latents])

    def update(self) -> None:
        """Moves each codebook once, a shared one by what all scales saw."""
        for layer in self.stack()[:1] if self.config.shared_codebook else self.stack():
            layer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`parts.health_over` the scales, or that of the codebook which they share."""
        if self.config.shared_codebook:
            return self.stack()[0].health(steps_per_epoch)
        return health_over({f"scale{n}": layer.health(steps_per_epoch) for n, layer in enumerate(self.stack())})

    def discard(self) -> None:
        for layer in self.stack():
            layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        path = f"{self.path}.layer"
        if self.config.shared_codebook:
            return self.stack()[0].warnings(metrics, steps_per_epoch, path)
        return [
            f"scale{number}: {line}"
            for number, layer in enumerate(self.stack())
            for line in layer.warnings(figures_of(f"scale{number}", metrics), steps_per_epoch, path)
        ]


def evenly_over_scales(scales: int, phis: int) -> list[int]:
    """Which phi each scale takes: the first and the last scale the first and the last, rounded to even in between."""
    return [round(number / max(scales - 1, 1) * (phis - 1)) for number in range(scales)]


def rows_of(rests: Sequence[Tensor]) -> Tensor:
    """Maps b d h w of one batch as b d n 1, one after the other."""
    return torch.cat([rearrange(rest, "b d h w -> b d (h w) 1") for rest in rests], 2)
