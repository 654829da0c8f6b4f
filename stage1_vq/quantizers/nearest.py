"""Vector quantizer: the nearest vector of a learned codebook (van den Oord et al. 2017, arXiv:1711.00937).

With, by choice, the codebook by exponential moving average (appendix A.1 there), a low-dimensional look-up with vectors
of length one (ViT-VQGAN, Yu et al. 2021, arXiv:2110.04627, section 3.2), the gradient of the rotation trick (Fifty et
al. 2024, arXiv:2410.06424), further losses on latents and codebook, k-means initialisation, revival of dead codes, and
code vectors that move to latents the more, the less they are in use (CVQ-VAE, Zheng & Vedaldi 2023, arXiv:2307.15139).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.distributed import global_mean
from common.errors import UserError, check_fields
from common.float32 import float32_island
from common.renaming import name_as_own
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.bits import entropy
from stage1_vq.quantizers.codebook import (
    Codebook,
    CodebookInit,
    CodebookSettings,
    CodebookUpdate,
    codebook_rules,
    look_up,
)
from stage1_vq.quantizers.codebook_losses import cross_entropy_of_codes, mean_soft_assignment, orthogonality
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.gradients import GRADIENTS, Gradient, pass_gradient
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class NearestQuantizerConfig:
    """The paper's own settings are the first five, with kmeans_iterations=0 and revive_after=0; the moving averages are
    those of its appendix, its experiments have codebook_update=gradient."""

    kind: Literal["nearest"] = "nearest"
    codebook_size: int = 512  # k
    dim: int = 64  # d, width of z and z_q
    commitment_weight: float = 0.25  # beta of the paper: pulls the encoder's output to its code vector
    codebook_update: CodebookUpdate = "ema"  # how code vectors follow the latents
    decay: float = 0.99  # of the moving averages (ema and refresh only)
    epsilon: float = 1e-5  # added to the averaged cluster sizes (ema only)
    lookup_dim: int | None = None  # width of the code vectors behind a projection; None: dim, and no projection
    l2_normalise: bool = False  # compare directions only: vectors and code vectors get length 1
    gradient: Gradient = "straight-through"  # how gradients pass from z_q to z
    # Or -ln softmax(-distance) of its own code, which tells codes apart but does not keep latents near them: alone it
    # learns far worse (eight pictures: 36% of their variance is left where the squared error leaves 3%).
    commitment: Literal["squared-error", "cross-entropy"] = "squared-error"  # how latents are tied to their codes
    orthogonal_weight: float = 0.0  # of `orthogonality`: pushes code vectors apart (codebook_update=gradient only)
    diversity_weight: float = 0.0  # of minus the entropy, in nats, of the codes' mean soft use in a batch
    diversity_temperature: float = 0.01  # of that soft use: a softmax of minus distance over this
    kmeans_iterations: int = 10  # on the first batch's latents, to start the codebook from; 0 starts from noise
    revive_after: int = 100  # steps without use, after which a latent takes the place of a code; 0 never
    revive_below: float = 0.0  # share of an even use, by moving average, below which a code is dead too (ema only)
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns
    init: CodebookInit = "unit"  # code vectors at first, without k-means: length 1 or so, +-1/codebook_size, normal
    refresh: bool = False  # each step moves code vectors to the latents nearest to them, by how little they are used

    def __post_init__(self) -> None:
        rules = [
            *codebook_rules(self),
            ("dim", self.dim >= 1, "at least 1"),
            ("lookup_dim", self.lookup_dim is None or self.lookup_dim >= 1, "at least 1, or null for none"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more; the paper has 0.25"),
            ("epsilon", self.epsilon > 0, "above 0; 1e-5 is common"),
            ("commitment", self.commitment in ("squared-error", "cross-entropy"), "squared-error or cross-entropy"),
            ("orthogonal_weight", self.orthogonal_weight >= 0, "0 or more; its paper has 10"),
            (
                "orthogonal_weight",
                not self.orthogonal_weight or self.codebook_update == "gradient",
                "0 where codebook_update=ema: give codebook_update=gradient, for a loss moves nothing else",
            ),
            ("diversity_weight", self.diversity_weight >= 0, "0 or more"),
            ("diversity_temperature", self.diversity_temperature > 0, "above 0"),
            ("revive_below", 0 <= self.revive_below < 1, "0 (no use at all is dead) to below 1; up to 0.5 is common"),
            (
                "revive_below",
                not self.revive_below or (self.revive_after > 0 and self.codebook_update == "ema"),
                "0 unless revive_after is above 0, which is the time a revived code has, and codebook_update=ema",
            ),
            ("gradient", self.gradient in GRADIENTS, "straight-through or rotation"),
            (
                "refresh",
                not self.refresh or (self.codebook_update == "gradient" and not self.revive_after),
                "false unless codebook_update=gradient and revive_after=0: it brings dead codes back itself",
            ),
        ]
        check_fields(self, rules)

    def codebook_settings(self, size: int | None = None) -> CodebookSettings:
        """Of the codebook, or of one that differs from it in size."""
        return CodebookSettings(
            size=size or self.codebook_size,
            width=self.lookup_dim or self.dim,
            update=self.codebook_update,
            decay=self.decay,
            epsilon=self.epsilon,
            unit_length=self.l2_normalise,
            init=self.init,
            kmeans_iterations=self.kmeans_iterations,
            revive_after=self.revive_after,
            revive_below=self.revive_below,
            warn_usage_below=self.warn_usage_below,
            refresh=self.refresh,
        )


def places(vectors: Tensor, mask: Tensor) -> Tensor:
    """Those of vectors b d h w where the mask, b h w, has True, as the row of one image: 1 d 1 n."""
    return rearrange(rearrange(vectors, "b d h w -> b h w d")[mask], "n d -> 1 d 1 n")


def lookup_losses(
    config: NearestQuantizerConfig, z: Tensor, error: Tensor, codes: Tensor, vectors: Tensor, *, training: bool
) -> dict[str, Tensor]:
    """What the config asks for of latents z, b d h w, given their squared error from their nearest vectors, their
    codes, b h w, and all vectors, k d. Squared errors are means per element, the commitment loss as a cross-entropy in
    nats per latent; all of them times their weights."""
    losses = {"commitment_loss": config.commitment_weight * error}
    if config.codebook_update == "gradient":
        losses["codebook_loss"] = F.mse_loss(F.embedding(codes, vectors), rearrange(z.detach(), "b d h w -> b h w d"))
    if config.orthogonal_weight:
        losses["orthogonal_loss"] = config.orthogonal_weight * orthogonality(vectors)
    diverse = config.diversity_weight and training
    if config.commitment == "squared-error" and not diverse:
        return losses
    rows = rearrange(z, "b d h w -> (b h w) d")
    if config.commitment == "cross-entropy":
        cross_entropy = cross_entropy_of_codes(rows, vectors.detach(), codes.flatten())
        losses["commitment_loss"] = config.commitment_weight * cross_entropy
    if diverse:
        use = mean_soft_assignment(rows, vectors, 1 / config.diversity_temperature)
        losses["diversity_loss"] = -config.diversity_weight * entropy(global_mean(use))
    return losses


class NearestQuantizer(Quantizer):
    """z -> [1x1 convolution to lookup_dim] -> [length 1] -> nearest code vector -> [1x1 convolution to dim] -> z_q.

    All of it in float32, also under autocast: bfloat16 has 8 bits to tell distances apart. z_q has the type of z.
    """

    config_class = NearestQuantizerConfig

    def __init__(self, config: NearestQuantizerConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        projected = config.lookup_dim is not None
        d = config.lookup_dim or config.dim
        self.project_in = ProductConv2d(config.dim, d) if projected else nn.Identity()
        self.project_out = ProductConv2d(d, config.dim) if projected else nn.Identity()
        self.entries = Codebook(config.codebook_settings())
        name_as_own(self, "entries")

    @property
    def codebook(self) -> Tensor:
        """k d."""
        return self.entries.codebook

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        return (Grid("codes", height, width, self.config.codebook_size),)

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """z: b d h w; mask: b h w, bool, for latents some of which are padding: where it is False, z_q is 0 and the
        code -1, and neither losses nor codebook know of it.

        Losses: `commitment_loss`, times its weight, and for a codebook that learns by gradient `codebook_loss`;
        statistics: `quantization_error`; all of them squared errors per element of the look-up, but for the commitment
        loss as a cross-entropy in nats per latent. Where they have weights: `orthogonal_loss`, and in training mode
        `diversity_loss`."""
        if mask is not None and (mask.shape != z[:, 0].shape or mask.dtype != torch.bool):
            raise UserError(
                f"got a mask of shape {tuple(mask.shape)} and type {mask.dtype}, expected one bool for each place of "
                f"the latents: shape {tuple(z[:, 0].shape)}, torch.bool"
            )
        with float32_island(z.device.type):
            looked_up, vectors = self.lookup_vectors(z), self.entries.code_vectors()
            codes = self.entries.nearest(looked_up.detach(), vectors.detach(), note=self.training, mask=mask)
            nearest = look_up(codes, vectors.detach())
            z_q = self.project_out(pass_gradient(self.config.gradient, looked_up, nearest)).to(z.dtype)
            counted = codes
            if mask is not None:
                z_q, codes = z_q * mask.unsqueeze(1), codes.masked_fill(~mask, -1)
                looked_up, nearest, counted = (
                    places(each, mask) for each in (looked_up, nearest, counted.unsqueeze(1))
                )
                counted = counted.squeeze(1)
            error = squared_error(looked_up, nearest)
            losses = lookup_losses(self.config, looked_up, error, counted, vectors, training=self.training)
            return Quantized(z_q, (codes,), losses, {"quantization_error": error.detach()})

    def codes(self, z: Tensor) -> Codes:
        with float32_island(z.device.type):
            return (self.entries.codes(self.lookup_vectors(z)),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        with float32_island(only.device.type):
            return self.project_out(self.entries.look_up(only))

    def lookup_vectors(self, z: Tensor) -> Tensor:
        """z, b d h w, where it is compared with the code vectors."""
        self.check_latents(z)
        looked_up = self.project_in(z.float())
        return F.normalize(looked_up, dim=1) if self.config.l2_normalise else looked_up

    # ---- the codebook, once per step --------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means over the latents, b d h w each, of all micro-batches and processes."""
        with float32_island(batches[0].device.type):
            self.entries.initialise([self.lookup_vectors(z) for z in batches])

    def update(self) -> None:
        self.entries.update()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """That of the codebook."""
        return self.entries.health(steps_per_epoch)

    def discard(self) -> None:
        self.entries.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        further = [] if self.config.l2_normalise else [f"{self.path}.l2_normalise=true with {self.path}.lookup_dim=8"]
        return self.entries.warnings(metrics, steps_per_epoch, self.path, further)
