"""Residual quantizer: a latent as the sum of code vectors, each the nearest to what the ones before it left.

RQ-VAE (Lee et al. 2022, arXiv:2203.01941, section 3.1), which shares one codebook between all layers, and SoundStream
(Zeghidour et al. 2021, arXiv:2107.03312, section III-C), which gives each layer its own and trains with quantizer
dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.errors import FieldError, check_fields, fields_at
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.beam import beam_search_after
from stage1_vq.quantizers.codebook import Codebook, look_up
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.gradients import pass_gradient
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig, lookup_losses
from stage1_vq.quantizers.parts import draw_kept, figures_of, health_over, mean_over
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class ResidualQuantizerConfig:
    """A latent takes `depth` codes. RQ-VAE's own settings are depth=4 and shared_codebook=true; SoundStream's are
    quantizer_dropout=1 and a codebook per layer."""

    kind: Literal["residual"] = "residual"
    depth: int = 4  # D, code vectors that add up to a latent
    layer: NearestQuantizerConfig = field(default_factory=NearestQuantizerConfig)  # how each of them is found
    codebook_sizes: tuple[int, ...] = ()  # of each layer, where they differ; empty: layer.codebook_size
    shared_codebook: bool = False  # one codebook for all layers
    dim: int | None = None  # d, width of z and z_q, projected to layer.dim and back; null: layer.dim, no projection
    quantizer_dropout: float = 0.0  # share of training images whose z_q ends after a random number of layers
    gradient_through: Literal["sum", "layers"] = "sum"  # from z_q to z: once, or by each layer to its own residual
    gradient_between: float = 0.0  # share of a layer's gradient that reaches the code vectors before it (layers only)
    beam: int = 1  # beginnings that the search for codes keeps; 1: each layer takes its nearest

    def __post_init__(self) -> None:
        sizes = self.codebook_sizes
        rules = [
            ("depth", self.depth >= 1, "at least 1"),
            ("codebook_sizes", not sizes or len(sizes) == self.depth, f"one for each of the depth={self.depth} layers"),
            ("codebook_sizes", all(size >= 2 for size in sizes), "at least 2 each: one code carries no bits"),
            ("codebook_sizes", not (sizes and self.shared_codebook), "none where shared_codebook=true"),
            ("dim", self.dim is None or self.dim >= 1, "at least 1, or null for layer.dim"),
            ("quantizer_dropout", 0 <= self.quantizer_dropout <= 1, "a share from 0 to 1; SoundStream has 1"),
            ("gradient_through", self.gradient_through in ("sum", "layers"), "sum or layers"),
            ("gradient_between", 0 <= self.gradient_between <= 1, "a share from 0 to 1"),
            (
                "gradient_between",
                not self.gradient_between or self.gradient_through == "layers",
                "0 where gradient_through=sum, which passes by all layers",
            ),
            ("beam", self.beam >= 1, "at least 1; 4 to 16 are common"),
        ]
        check_fields(self, rules)
        check_residual_layer(self)


def check_residual_layer(config: Any) -> None:
    """Raises FieldError where `config.layer`, of a quantizer whose vectors add up, compares other vectors than it
    adds."""
    layer = config.layer
    if layer.lookup_dim is not None:
        raise FieldError(
            config,
            "layer.lookup_dim",
            "null: residuals are left in the space of the code vectors, so give that width as "
            f"layer.dim={layer.lookup_dim}, and dim={layer.dim} beside layer for the latents; the projections then "
            "stand once around all layers"
            if hasattr(config, "dim")
            else "null: residuals are left in the space of the code vectors",
        )
    if layer.l2_normalise:
        raise FieldError(
            config,
            "layer.l2_normalise",
            "False: residuals grow shorter from layer to layer, and code vectors of length 1 cannot follow them",
        )


class ResidualQuantizer(Quantizer):
    """z -> [1x1 convolution to layer.dim] -> r; r_1 = r, e_i nearest to r_i, r_i+1 = r_i - e_i; e_1 + ... + e_D -> [1x1
    convolution to dim] -> z_q.

    The gradient passes from z_q to z once, as through a single quantizer, so that the rotation trick turns z into the
    whole sum. With gradient_through=layers each layer passes it to its own residual, which adds them up at z: as in
    vector-quantize-pytorch, where the rotation trick turns each residual into its code vector, and the straight-through
    gradient reaches z D times, or with gradient_between less often, as each layer then takes back a share of what those
    before it pass. Each layer's commitment loss pulls the latent to the sum of the code vectors so far; the
    losses are means over the layers. All of it in float32.
    """

    config_class = ResidualQuantizerConfig

    def __init__(self, config: ResidualQuantizerConfig) -> None:
        inner = config.layer.dim
        super().__init__(config.dim or inner)
        self.config = config
        projected = config.dim not in (None, inner)
        self.project_in = ProductConv2d(self.dim, inner) if projected else nn.Identity()
        self.project_out = ProductConv2d(inner, self.dim) if projected else nn.Identity()
        sizes = config.codebook_sizes or config.depth * (config.layer.codebook_size,)
        different = sizes[:1] if config.shared_codebook else sizes
        self.layers = nn.ModuleList(Codebook(config.layer.codebook_settings(size)) for size in different)

    @classmethod
    def config_from(cls, values: Mapping[str, Any]) -> ResidualQuantizerConfig:
        with fields_at("layer"):
            layer = NearestQuantizer.config_from(values["layer"])
        return super().config_from({**values, "layer": layer})

    def stack(self) -> list[Codebook]:
        """The codebook of each layer; with a shared one D times the same."""
        layers: Any = list(self.layers)
        return self.config.depth * layers if self.config.shared_codebook else layers

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One per layer, `depth0` first."""
        sizes = [layer.settings.size for layer in self.stack()]
        return tuple(Grid(f"depth{number}", height, width, k) for number, k in enumerate(sizes))

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def forward(self, z: Tensor, kept: Tensor | None = None) -> Quantized:
        """z: b d h w; kept: as `draw_kept` draws it, None: drawn here. Losses: those of the layers, averaged;
        statistics: `quantization_error`, the squared error per element that all layers together leave."""
        self.check_latents(z)
        layer_config, by_layers = self.config.layer, self.config.gradient_through == "layers"
        kept = self.draw_kept(len(z), z.device) if kept is None else kept
        with float32_island(z.device.type):
            latents = self.project_in(z.float())
            residual, total = latents, torch.zeros_like(latents)
            searched = self.search(latents.detach(), ()) if self.config.beam > 1 else None
            codes: list[Tensor] = []
            losses: list[dict[str, Tensor]] = []
            for number, layer in enumerate(self.stack()):
                vectors = layer.code_vectors()
                if searched is None:
                    codes.append(layer.nearest(residual.detach(), vectors.detach(), note=self.training))
                else:
                    codes.append(searched[number])
                    if self.training:
                        layer.note(residual.detach(), codes[-1])
                nearest = look_up(codes[-1], vectors.detach())
                error = squared_error(residual, nearest)
                losses.append(lookup_losses(layer_config, residual, error, codes[-1], vectors, training=self.training))
                passed = pass_gradient(layer_config.gradient, residual, nearest) if by_layers else nearest
                total = total + (passed if kept is None else passed * (number < kept.view(-1, 1, 1, 1)))
                residual = residual - nearest
                if self.config.gradient_between:
                    residual = residual - self.config.gradient_between * (passed - passed.detach())
            if self.config.shared_codebook:
                self.stack()[0].join_calls(self.config.depth, len(z))
            passed = total if by_layers else pass_gradient(layer_config.gradient, latents, total)
            z_q = self.project_out(passed).to(z.dtype)
        # After the last layer: its latents less its vectors.
        return Quantized(z_q, tuple(codes), mean_over(losses), {"quantization_error": error.detach()})

    def draw_kept(self, b: int, device: torch.device) -> Tensor | None:
        """Codebooks, codes and losses know nothing of it: every layer learns from every image, so that neither the
        codebooks nor the weights with a gradient depend on what each process has drawn."""
        share = self.config.quantizer_dropout
        return draw_kept(b, self.config.depth, share, device) if self.training and share else None

    def codes(self, z: Tensor) -> Codes:
        return self.codes_after(z, ())

    @torch.no_grad()
    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Each layer describes what the ones before it, as they were chosen, leave of z."""
        self.check_latents(z)
        with float32_island(z.device.type):
            return self.search(self.project_in(z.float()), chosen)

    @torch.no_grad()
    def search(self, latents: Tensor, chosen: Codes) -> Codes:
        """The codes of narrow latents."""
        stack = self.stack()
        if self.config.beam > 1:
            return beam_search_after(
                latents, len(stack), lambda number, _: stack[number].code_vectors(), self.config.beam, chosen
            )
        residual = latents
        found: list[Tensor] = []
        for number, layer in enumerate(stack):
            found.append(chosen[number] if number < len(chosen) else layer.codes(residual))
            residual = residual - layer.look_up(found[-1])
        return tuple(found)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        return self.latents_of_first(codes, codes[-1].shape[1], codes[-1].shape[2])

    def latents_of_first(self, codes: Codes, height: int, width: int) -> Tensor:
        with float32_island(codes[0].device.type):
            parts = [layer.look_up(grid) for layer, grid in zip(self.stack()[: len(codes)], codes, strict=True)]
            return self.project_out(torch.stack(parts).sum(0))

    # ---- the codebooks, once per step -------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means layer by layer, each over the residuals that the ones before it leave; a shared codebook over the
        latents, and then over them and the residuals which that codebook leaves."""
        if not self.config.layer.kmeans_iterations:
            return
        with float32_island(batches[0].device.type):
            residuals = [[self.project_in(z.float())] for z in batches]  # of each micro-batch, layer by layer
            for number, layer in enumerate(self.stack()):
                if number == 0 or not self.config.shared_codebook:
                    layer.initialise([batch[-1] for batch in residuals])
                for batch in residuals:
                    batch.append(batch[-1] - layer.look_up(layer.codes(batch[-1])))
            if self.config.shared_codebook:
                by_image = [torch.stack(batch[:-1], 1) for batch in residuals]
                layer.initialise([rearrange(batch, "b depth d h w -> (b depth) d h w") for batch in by_image])

    def update(self) -> None:
        """Moves each codebook once, a shared one by what all layers saw."""
        for layer in self.stack()[:1] if self.config.shared_codebook else self.stack():
            layer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`parts.health_over` the layers, or that of the codebook which they share."""
        if self.config.shared_codebook:
            return self.stack()[0].health(steps_per_epoch)
        return health_over({f"depth{n}": layer.health(steps_per_epoch) for n, layer in enumerate(self.stack())})

    def discard(self) -> None:
        for layer in self.stack():
            layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        path = f"{self.path}.layer"
        if self.config.shared_codebook:
            return self.stack()[0].warnings(metrics, steps_per_epoch, path)
        found: list[str] = []
        for number, layer in enumerate(self.stack()):
            lines = layer.warnings(figures_of(f"depth{number}", metrics), steps_per_epoch, path)
            found += [f"depth{number}: {line}" for line in lines]
        return found
