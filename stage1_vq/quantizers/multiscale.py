"""Multi-scale residual quantizer of VAR (Tian et al. 2024, arXiv:2404.02905, section 3.2 and algorithms 1 and 2), with
what XQ-GAN (Li et al. 2024, arXiv:2412.01762) and ImageFolder (arXiv:2410.01756) add to it: quantizer dropout, so that
any number of scales decodes, and codes by direction.

A map of latents becomes grids of codes from 1x1 up to its own size, all of one codebook: each grid describes what the
coarser ones left, and a prior can draw a whole grid at once given the ones before it. Several such quantizers, each of
its own channels, are a `grouped` one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.codebook import (
    Codebook,
    CodebookInit,
    CodebookSettings,
    CodebookUpdate,
    codebook_rules,
    look_up,
)
from stage1_vq.quantizers.gradients import StraightThrough
from stage1_vq.quantizers.scales import (
    ScaleQuantizer,
    fitting_phis,
    phi_convolutions,
    phi_of_each_scale,
    scale_rules,
)
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class MultiscaleQuantizerConfig:
    """VAR's own settings are these defaults with codebook_update=gradient, kmeans_iterations=0 and revive_after=0;
    XQ-GAN's, compare=direction and quantizer_dropout=0.1 besides.

    By gradient the code vectors lag behind the latents early in training, phi learns to stretch them, and a code that
    is revived, of full length, is then far off: there better leave revive_after at 0.
    """

    kind: Literal["multiscale"] = "multiscale"
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # sides of the grids, coarse to fine: the last is h = w
    codebook_size: int = 4096  # k, of the one codebook of all scales
    dim: int = 32  # d, width of z and z_q
    commitment_weight: float = 0.25  # beta: pulls the latents to the sum of the scales
    codebook_update: CodebookUpdate = "ema"  # how code vectors follow what they stand for
    decay: float = 0.99  # of the moving averages (ema only)
    phis: int = 4  # 3x3 convolutions after up-sampling, each shared by neighbouring scales
    phi_share: float = 0.5  # of the convolution in what phi adds; the rest is the up-sampled map itself
    kmeans_iterations: int = 10  # on the first batch's latents, to start the codebook from; 0 starts from noise
    revive_after: int = 100  # steps without use, after which a latent takes the place of a code; 0 never
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns
    init: CodebookInit = "unit"  # code vectors at first, without k-means: length 1 or so, +-1/codebook_size, normal
    compare: Literal["distance", "direction"] = "distance"  # which code a rest takes: the nearest, or of its direction
    quantizer_dropout: float = 0.0  # share of training images whose z_q ends after a random number of scales
    fewest_scales: int = 1  # that quantizer_dropout leaves

    def __post_init__(self) -> None:
        rules = [
            *codebook_rules(self),
            *scale_rules(self, fitting_phis(len(self.scales))),
            ("dim", self.dim >= 1, "at least 1"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more; the paper has 0.25"),
            ("compare", self.compare in ("distance", "direction"), "distance or direction"),
        ]
        check_fields(self, rules)


class MultiscaleQuantizer(ScaleQuantizer):
    """With f the latents, and from scale 1 to S of them:

        rest = f - sum
        codes_s = nearest(area-average of rest on the grid of scale s)
        sum = sum + phi_s(bicubic up-sampling of the code vectors)

    z_q is the last sum, with the gradient passed straight to z; phi, and the codebook by gradient, learn from the
    losses. With compare=direction the nearest is that of the largest cosine, and what is added has the length of the
    code vector. All of it in float32.
    """

    config_class = MultiscaleQuantizerConfig
    config: MultiscaleQuantizerConfig

    def __init__(self, config: MultiscaleQuantizerConfig) -> None:
        super().__init__(config, config.dim, config.dim, phi_of_each_scale(len(config.scales), config.phis))
        self.layer = Codebook(
            CodebookSettings(
                size=config.codebook_size,
                width=config.dim,
                update=config.codebook_update,
                decay=config.decay,
                init=config.init,
                kmeans_iterations=config.kmeans_iterations,
                revive_after=config.revive_after,
                warn_usage_below=config.warn_usage_below,
            )
        )
        self.phis = phi_convolutions(config.dim, config.phis)

    @property
    def vocabulary(self) -> int:
        return self.config.codebook_size

    def compared(self) -> Tensor:
        """k d, the code vectors as a rest is compared with them. The nearest of vectors of length 1 is that of the
        largest cosine, however long the rest itself is, which counts as it is for the moving averages."""
        vectors = self.layer.codebook.detach()
        return F.normalize(vectors, dim=1) if self.config.compare == "direction" else vectors

    def nearest(self, rest: Tensor, number: int) -> Tensor:
        return self.layer.nearest(rest, self.compared(), note=False)

    def vectors(self, codes: Tensor, number: int) -> Tensor:
        return look_up(codes, self.layer.codebook)

    def forward(self, z: Tensor, kept: Tensor | None = None) -> Quantized:
        """z: b d h w; kept: as `draw_kept` draws it, None: drawn here. Losses, squared errors per element of the sum
        after each scale, averaged over the scales: `commitment_loss`, times its weight, and `codebook_loss`;
        statistics: `quantization_error`, that of the last."""
        self.check_latents(z)
        kept = self.draw_kept(len(z), z.device) if kept is None else kept
        with float32_island(z.device.type):
            latents, vectors = z.float(), self.compared()
            target, total = latents.detach(), torch.zeros_like(latents)
            found: list[Tensor] = []
            sums: list[Tensor] = []
            errors: dict[str, list[Tensor]] = {"commitment_loss": [], "codebook_loss": []}
            for number, size in enumerate(self.sizes(*z.shape[2:])):
                rest = self.shrink(target - total.detach(), number, size)
                found.append(self.layer.nearest(rest, vectors, note=self.training))
                total = total + self.grow(found[-1], number, target.shape[2:])
                sums.append(total.detach())
                errors["codebook_loss"].append(squared_error(total, target))
                if self.config.commitment_weight:
                    error = squared_error(latents, total.detach())
                    errors["commitment_loss"].append(self.config.commitment_weight * error)
            if self.training:
                self.layer.join_calls(len(found), len(z))
            losses = {name: torch.stack(values).mean() for name, values in errors.items() if values}
            statistics = {"quantization_error": errors["codebook_loss"][-1].detach()}
            z_q = StraightThrough.apply(latents, self.seen_by_decoder(sums, kept)).to(z.dtype)
            return Quantized(z_q, tuple(found), losses, statistics)

    @torch.no_grad()
    def scale_parts(self) -> dict[str, Tensor] | None:
        return {"codebook": self.layer.codebook.detach(), **self.folded_phis()}

    # ---- the codebook, once per step --------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means over the latents, and then over what each scale has to describe under the codebook which that
        gives."""
        if not self.config.kmeans_iterations:
            return
        with float32_island(batches[0].device.type):
            latents = [z.float() for z in batches]
            self.layer.initialise(latents)
            of_scales = [self.walk(z)[0] for z in latents]
            rows = [[rearrange(rest, "b d h w -> b d (h w) 1") for rest in rests] for rests in of_scales]
            self.layer.initialise([torch.cat(rests, 2) for rests in rows])

    def update(self) -> None:
        """Moves the codebook (ema) by what all scales saw, and revives dead codes."""
        self.layer.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """That of the codebook."""
        return self.layer.health(steps_per_epoch)

    def discard(self) -> None:
        self.layer.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        return self.layer.warnings(metrics, steps_per_epoch, self.path)
