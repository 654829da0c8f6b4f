"""Vector quantizer: the nearest vector of a learned codebook (van den Oord et al. 2017, arXiv:1711.00937).

With, by choice, the codebook by exponential moving average (appendix A.1 there), a low-dimensional look-up with vectors
of length one (ViT-VQGAN, Yu et al. 2021, arXiv:2110.04627, section 3.2), the gradient of the rotation trick (Fifty et
al. 2024, arXiv:2410.06424), further losses on latents and codebook, k-means initialisation and revival of dead codes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from codes.spec import Codes, Grid
from common.compatibility import never_compiled
from common.distributed import draw_rows, global_mean, sum_over_processes
from common.errors import UserError
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.bits import entropy
from stage1_vq.quantizers.codebook_losses import cross_entropy_of_codes, mean_soft_assignment, orthogonality
from stage1_vq.quantizers.kmeans import kmeans
from stage1_vq.quantizers.search import nearest_codes
from stage1_vq.quantizers.usage import CodeUsage, usage_remedies

REMEMBERED_BATCHES = 64  # micro-batches of one step that dead codes are revived from


@dataclass(frozen=True, kw_only=True)
class NearestQuantizerConfig:
    """The paper's own settings are the first five, with kmeans_iterations=0 and revive_after=0; the moving averages are
    those of its appendix, its experiments have codebook_update=gradient."""

    kind: Literal["nearest"] = "nearest"
    codebook_size: int = 512  # k
    dim: int = 64  # d, width of z and z_q
    commitment_weight: float = 0.25  # beta of the paper: pulls the encoder's output to its code vector
    codebook_update: Literal["ema", "gradient"] = "ema"  # how code vectors follow the latents
    decay: float = 0.99  # of the moving averages (ema only)
    epsilon: float = 1e-5  # added to the averaged cluster sizes (ema only)
    lookup_dim: int | None = None  # width of the code vectors behind a projection; None: dim, and no projection
    l2_normalise: bool = False  # compare directions only: vectors and code vectors get length 1
    gradient: Literal["straight-through", "rotation"] = "straight-through"  # how gradients pass from z_q to z
    # Or -ln softmax(-distance) of its own code, which tells codes apart but does not keep latents near them: alone it
    # learns far worse (eight pictures: 36% of their variance is left where the squared error leaves 3%).
    commitment: Literal["squared-error", "cross-entropy"] = "squared-error"  # how latents are tied to their codes
    orthogonal_weight: float = 0.0  # of `orthogonality`: pushes code vectors apart (codebook_update=gradient only)
    diversity_weight: float = 0.0  # of minus the entropy, in nats, of the codes' mean soft use in a batch
    diversity_temperature: float = 0.01  # of that soft use: a softmax of minus distance over this
    kmeans_iterations: int = 10  # on the first batch's latents, to start the codebook from; 0 starts from noise
    revive_after: int = 100  # steps without use, after which a latent takes the place of a code; 0 never
    revive_below: float = (
        0.0  # share of an even use of all codes, by moving average, below which a code is dead too (ema)
    )
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("codebook_size", self.codebook_size >= 2, "at least 2: one code carries no bits"),
            ("dim", self.dim >= 1, "at least 1"),
            ("lookup_dim", self.lookup_dim is None or self.lookup_dim >= 1, "at least 1, or null for none"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more; the paper has 0.25"),
            ("decay", 0 <= self.decay < 1, "from 0 to below 1; the paper has 0.99"),
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
            ("kmeans_iterations", self.kmeans_iterations >= 0, "0 or more"),
            ("revive_after", self.revive_after >= 0, "0 (never) or a number of steps"),
            ("revive_below", 0 <= self.revive_below < 1, "0 (no use at all is dead) to below 1; up to 0.5 is common"),
            (
                "revive_below",
                not self.revive_below or (self.revive_after > 0 and self.codebook_update == "ema"),
                "0 unless revive_after is above 0, which is the time a revived code has, and codebook_update=ema",
            ),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
            ("codebook_update", self.codebook_update in ("ema", "gradient"), "ema or gradient"),
            ("gradient", self.gradient in ("straight-through", "rotation"), "straight-through or rotation"),
        ):
            if not valid:
                raise UserError(f"model.quantizer.{name}={getattr(self, name)}, expected {expected}")


def places(vectors: Tensor, mask: Tensor) -> Tensor:
    """Those of vectors b d h w where the mask, b h w, has True, as the row of one image: 1 d 1 n."""
    return rearrange(rearrange(vectors, "b d h w -> b h w d")[mask], "n d -> 1 d 1 n")


class StraightThrough(torch.autograd.Function):
    """The code vectors, with the identity as gradient to z (van den Oord et al. 2017, section 3.2)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nearest: Tensor) -> Tensor:
        return nearest.view_as(nearest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Rotation(torch.autograd.Function):
    """The code vectors e, seen as z rotated and scaled: e = |e|/|z| R z, with R and the scale held constant in the
    backward pass (Fifty et al. 2024, section 4). R = 1 - 2 r r^T + 2 e' z'^T, where z' and e' are z and e at length 1
    and r is z' + e' at length 1. Vectors lie along axis 1."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nearest: Tensor) -> Tensor:
        ctx.save_for_backward(z, nearest)
        return nearest.view_as(nearest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, nearest = ctx.saved_tensors
        z_length = z.norm(dim=1, keepdim=True).clamp(min=1e-6)
        scale = nearest.norm(dim=1, keepdim=True) / z_length
        z_unit, e_unit = z / z_length, F.normalize(nearest, dim=1)
        r = F.normalize(z_unit + e_unit, dim=1)
        along_r = (r * grad).sum(1, keepdim=True)
        along_e = (e_unit * grad).sum(1, keepdim=True)
        return scale * (grad - 2 * along_r * r + 2 * along_e * z_unit), None


class NearestQuantizer(Quantizer):
    """z -> [1x1 convolution to lookup_dim] -> [length 1] -> nearest code vector -> [1x1 convolution to dim] -> z_q.

    All of it in float32, also under autocast: bfloat16 has 8 bits to tell distances apart. z_q has the type of z.
    """

    config_class = NearestQuantizerConfig

    codebook: Tensor  # k d
    cluster_sizes: Tensor  # k, moving average of the vectors per step that a code is nearest to
    vector_sums: Tensor  # k d, moving average of their sum
    pending_sums: Tensor  # k d: their sum in the forward passes since the last update
    steps_since_revival: Tensor  # k, int64

    def __init__(self, config: NearestQuantizerConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        k, d = config.codebook_size, config.lookup_dim or config.dim
        projected = config.lookup_dim is not None
        self.project_in = nn.Conv2d(config.dim, d, 1) if projected else nn.Identity()
        self.project_out = nn.Conv2d(d, config.dim, 1) if projected else nn.Identity()
        codebook = torch.randn(k, d) / d**0.5  # of length 1 or so
        if config.l2_normalise:
            codebook = F.normalize(codebook, dim=1)
        if config.codebook_update == "ema":
            self.register_buffer("codebook", codebook)
            self.register_buffer("cluster_sizes", torch.ones(k))
            self.register_buffer("vector_sums", codebook.clone())
            self.register_buffer("pending_sums", torch.zeros(k, d), persistent=False)
        else:
            self.codebook = nn.Parameter(codebook)
        self.usage = CodeUsage(k, config.warn_usage_below)
        self.register_buffer("steps_since_revival", torch.zeros(k, dtype=torch.int64))
        self.recent: deque[Tensor] = deque(maxlen=REMEMBERED_BATCHES)  # n d each, of this step's micro-batches

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
        with torch.autocast(z.device.type, enabled=False):
            vectors, code_vectors = self.lookup_vectors(z), self.code_vectors()
            codes = self.nearest(vectors.detach(), code_vectors.detach(), note=self.training, mask=mask)
            nearest = self.look_up(codes, code_vectors.detach())

            pass_gradient = StraightThrough if self.config.gradient == "straight-through" else Rotation
            z_q = self.project_out(pass_gradient.apply(vectors, nearest)).to(z.dtype)
            counted = codes
            if mask is not None:
                z_q, codes = z_q * mask.unsqueeze(1), codes.masked_fill(~mask, -1)
                vectors, nearest, counted = (places(each, mask) for each in (vectors, nearest, counted.unsqueeze(1)))
                counted = counted.squeeze(1)
            error = F.mse_loss(vectors, nearest)
            losses = {"commitment_loss": self.config.commitment_weight * error}
            if self.config.codebook_update == "gradient":
                latents = rearrange(vectors.detach(), "b d h w -> b h w d")
                losses["codebook_loss"] = F.mse_loss(F.embedding(counted, code_vectors), latents)
            losses |= self.further_losses(vectors, code_vectors, counted)
            return Quantized(z_q, (codes,), losses, {"quantization_error": error.detach()})

    def further_losses(self, vectors: Tensor, code_vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """What the config asks for beside the paper's losses, of vectors b d h w and their codes b h w."""
        config, losses = self.config, {}
        if config.orthogonal_weight:
            losses["orthogonal_loss"] = config.orthogonal_weight * orthogonality(code_vectors)
        diverse = config.diversity_weight and self.training
        if config.commitment == "squared-error" and not diverse:
            return losses
        rows = rearrange(vectors, "b d h w -> (b h w) d")
        if config.commitment == "cross-entropy":
            cross_entropy = cross_entropy_of_codes(rows, code_vectors.detach(), codes.flatten())
            losses["commitment_loss"] = config.commitment_weight * cross_entropy
        if diverse:
            use = mean_soft_assignment(rows, code_vectors, 1 / config.diversity_temperature)
            losses["diversity_loss"] = -config.diversity_weight * entropy(global_mean(use))
        return losses

    def codes(self, z: Tensor) -> Codes:
        with torch.autocast(z.device.type, enabled=False):
            return (self.nearest(self.lookup_vectors(z), self.code_vectors(), note=False),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        with torch.autocast(only.device.type, enabled=False):
            return self.project_out(self.look_up(only, self.code_vectors()))

    def lookup_vectors(self, z: Tensor) -> Tensor:
        """z, b d h w, where it is compared with the code vectors."""
        self.check_latents(z)
        vectors = self.project_in(z.float())
        return F.normalize(vectors, dim=1) if self.config.l2_normalise else vectors

    def code_vectors(self) -> Tensor:
        """k d, of length 1 with l2_normalise."""
        return F.normalize(self.codebook, dim=1) if self.config.l2_normalise else self.codebook

    def look_up(self, codes: Tensor, code_vectors: Tensor) -> Tensor:
        """b h w to b d h w: gathered along the last axis, which takes no copy to move the axes afterwards."""
        b, h, w = codes.shape
        numbers = rearrange(codes, "b h w -> b 1 (h w)").expand(-1, code_vectors.shape[1], -1)
        columns = code_vectors.t().contiguous().expand(b, -1, -1)  # b d k
        return rearrange(columns.gather(2, numbers), "b d (h w) -> b d h w", h=h, w=w)

    @never_compiled
    @torch.no_grad()
    def nearest(self, vectors: Tensor, code_vectors: Tensor, *, note: bool, mask: Tensor | None = None) -> Tensor:
        """Codes, b h w, of vectors b d h w; with `note` they count for the next `update`, where `mask`, b h w, has
        True."""
        b, _, h, w = vectors.shape
        rows = rearrange(vectors, "b d h w -> (b h w) d").contiguous()
        codes = nearest_codes(rows, code_vectors)
        if note:
            counted = slice(None) if mask is None else mask.flatten()
            self.usage.note(codes[counted])
            if self.config.codebook_update == "ema":
                self.pending_sums.index_add_(0, codes[counted], rows[counted])
            if self.config.revive_after:
                self.recent.append(rows[counted])
        return rearrange(codes, "(b h w) -> b h w", b=b, h=h, w=w)

    # ---- the codebook, once per step --------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means over the latents, b d h w each, of all micro-batches and processes."""
        if not self.config.kmeans_iterations:
            return
        with torch.autocast(batches[0].device.type, enabled=False):
            rows = [rearrange(self.lookup_vectors(z), "b d h w -> (b h w) d").contiguous() for z in batches]
        k, iterations = self.config.codebook_size, self.config.kmeans_iterations
        clusters = kmeans(rows, k, iterations, spherical=self.config.l2_normalise)
        self.codebook.copy_(clusters.centres)
        if self.config.codebook_update == "ema":
            self.cluster_sizes.copy_(clusters.sizes.clamp(min=1))
            self.vector_sums.copy_(self.codebook * self.cluster_sizes.unsqueeze(1))

    @torch.no_grad()
    def update(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """Moves the codebook (ema), revives dead codes, and says how it does: `CodeUsage.health`, and the number of
        codes revived over the last epoch (`revived_codes`)."""
        counts = self.usage.step()
        self.steps_since_revival += 1
        if self.config.codebook_update == "ema":
            self.move_codebook(counts, sum_over_processes(self.pending_sums))
        if self.config.revive_after:
            self.revive_dead_codes()

        self.discard()
        revived = (self.steps_since_revival < self.usage.window(steps_per_epoch)).sum()
        return {**self.usage.health(counts, steps_per_epoch), "revived_codes": revived}

    def move_codebook(self, counts: Tensor, sums: Tensor) -> None:
        """Moving averages of appendix A.1, with cluster sizes smoothed as in its authors' code (Sonnet)."""
        self.cluster_sizes.lerp_(counts.float(), 1 - self.config.decay)
        self.vector_sums.lerp_(sums, 1 - self.config.decay)
        total, epsilon = self.cluster_sizes.sum(), self.config.epsilon
        smoothed = (self.cluster_sizes + epsilon) * (total / (total + self.config.codebook_size * epsilon))
        torch.div(self.vector_sums, smoothed.unsqueeze(1), out=self.codebook)
        if self.config.l2_normalise:
            self.codebook.copy_(F.normalize(self.codebook, dim=1))

    def revive_dead_codes(self) -> None:
        """Puts random latents of this step in the place of dead codes."""
        useless = self.usage.steps_since_use >= self.config.revive_after
        if self.config.revive_below:
            # A code for one odd image in thousands is never idle for long, and lies waste all the same.
            useless |= self.cluster_sizes < self.config.revive_below * self.cluster_sizes.mean()
        dead = (useless & (self.steps_since_revival >= self.config.revive_after)).nonzero().squeeze(1)
        if not len(dead) or not self.recent:
            return
        latents = draw_rows(self.recent, len(dead))
        dead = dead[: len(latents)]  # with fewer latents than dead codes the rest wait for the next step
        self.codebook[dead] = latents
        self.steps_since_revival[dead] = 0
        if self.config.codebook_update == "ema":
            # With its old averages, all but zero, the next update would put the code somewhere else, and it would die
            # again. With a size at the bar of `revive_below`, its use from here on decides which side it falls to.
            size = (self.config.revive_below * self.cluster_sizes.mean()).clamp(min=1)
            self.cluster_sizes[dead] = size
            self.vector_sums[dead] = latents * size

    def discard(self) -> None:
        self.usage.discard()
        if self.config.codebook_update == "ema":
            self.pending_sums.zero_()
        self.recent.clear()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        remedies = usage_remedies(self.config.revive_after, self.config.kmeans_iterations, steps_per_epoch)
        if not self.config.l2_normalise:
            remedies.append("model.quantizer.l2_normalise=true with model.quantizer.lookup_dim=8")
        return self.usage.warnings(metrics, steps_per_epoch, remedies)
