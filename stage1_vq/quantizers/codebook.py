"""A codebook: the k vectors that latents are compared with, and what becomes of them from step to step.

They follow the latents by exponential moving average (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1) or by
gradient; by choice they start from k-means, and a latent takes the place of a vector that is not used, or vectors move
to latents the more, the less they are used (CVQ-VAE, Zheng & Vedaldi 2023, arXiv:2307.15139).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.compatibility import never_compiled
from common.distributed import draw_rows, rows_of_least, sum_over_processes
from stage1_vq.quantizers.kmeans import kmeans
from stage1_vq.quantizers.search import nearest_codes
from stage1_vq.quantizers.usage import CodeUsage, usage_remedies

REMEMBERED_BATCHES = 64  # micro-batches of one step that dead codes are revived from

CodebookUpdate = Literal["ema", "gradient"]
CodebookInit = Literal["unit", "uniform", "normal"]


@dataclass(frozen=True, kw_only=True)
class CodebookSettings:
    """What the config of a quantizer says of its codebook: see NearestQuantizerConfig."""

    size: int  # k
    width: int  # d
    update: CodebookUpdate
    decay: float
    epsilon: float = 1e-5
    unit_length: bool = False  # the vectors are compared by direction, at length 1
    init: CodebookInit
    kmeans_iterations: int
    revive_after: int
    revive_below: float = 0.0
    warn_usage_below: float
    refresh: bool = False


class CodebookFields(Protocol):
    """The fields by which configs speak of a codebook."""

    @property
    def codebook_size(self) -> int: ...
    @property
    def codebook_update(self) -> str: ...
    @property
    def decay(self) -> float: ...
    @property
    def init(self) -> str: ...
    @property
    def kmeans_iterations(self) -> int: ...
    @property
    def revive_after(self) -> int: ...
    @property
    def warn_usage_below(self) -> float: ...


def codebook_rules(config: CodebookFields) -> list[tuple[str, bool, str]]:
    """For `common.errors.check_fields`."""
    return [
        ("codebook_size", config.codebook_size >= 2, "at least 2: one code carries no bits"),
        ("codebook_update", config.codebook_update in ("ema", "gradient"), "ema or gradient"),
        ("decay", 0 <= config.decay < 1, "from 0 to below 1; 0.99 is common"),
        ("init", config.init in ("unit", "uniform", "normal"), "unit, uniform or normal"),
        ("kmeans_iterations", config.kmeans_iterations >= 0, "0 or more"),
        ("revive_after", config.revive_after >= 0, "0 (never) or a number of steps"),
        ("warn_usage_below", 0 <= config.warn_usage_below <= 1, "a share from 0 to 1"),
    ]


class Codebook(nn.Module):
    """Vectors, search, moving averages, k-means, revival and usage.

    In training mode passes over latents only *note* what they saw; `update` moves the vectors, once a step. All of it
    in float32.
    """

    codebook: Tensor  # k d, a buffer (ema) or a parameter (gradient)
    cluster_sizes: Tensor  # k, moving average of the vectors per step that a code is nearest to
    vector_sums: Tensor  # k d, moving average of their sum
    pending_sums: Tensor  # k d: their sum in the forward passes since the last update
    steps_since_revival: Tensor  # k, int64
    shares: Tensor  # k, moving average of the share of latents that a code is nearest to (refresh only)

    def __init__(self, settings: CodebookSettings) -> None:
        super().__init__()
        self.settings = settings
        k, d = settings.size, settings.width
        codebook = first_vectors(settings.init, k, d)
        if settings.unit_length:
            codebook = F.normalize(codebook, dim=1)
        if settings.update == "ema":
            self.register_buffer("codebook", codebook)
            self.register_buffer("cluster_sizes", torch.ones(k))
            self.register_buffer("vector_sums", codebook.clone())
            self.register_buffer("pending_sums", torch.zeros(k, d), persistent=False)
        else:
            self.codebook = nn.Parameter(codebook)
        self.usage = CodeUsage(k, settings.warn_usage_below)
        self.register_buffer("steps_since_revival", torch.zeros(k, dtype=torch.int64))
        if settings.refresh:
            self.register_buffer("shares", torch.zeros(k))
        self.recent: deque[Tensor] = deque(maxlen=REMEMBERED_BATCHES)  # n d each, of this step's micro-batches

    # ---- latents and codes ------------------------------------------------------------------------------------------

    def code_vectors(self) -> Tensor:
        """k d, as they are compared and looked up: of length 1 with unit_length."""
        return F.normalize(self.codebook, dim=1) if self.settings.unit_length else self.codebook

    @never_compiled
    @torch.no_grad()
    def nearest(self, z: Tensor, vectors: Tensor, *, note: bool, mask: Tensor | None = None) -> Tensor:
        """Codes, b h w, of z, b d h w, among `vectors`, k d. With `note` they count for the next `update`, where
        `mask`, b h w, has True."""
        rows, codes = rows_and_codes(z, vectors)
        if note:
            counted = slice(None) if mask is None else mask.flatten()
            self.note_rows(rows[counted], codes[counted])
        return codes_as_map(codes, z)

    @never_compiled
    @torch.no_grad()
    def note(self, z: Tensor, codes: Tensor) -> None:
        """Codes, b h w, that somebody has found for z, b d h w, count for the next `update`."""
        self.note_rows(rearrange(z, "b d h w -> (b h w) d").contiguous(), codes.flatten())

    def note_rows(self, rows: Tensor, codes: Tensor) -> None:
        """rows: n d; codes: n."""
        self.usage.note(codes)
        if self.settings.update == "ema":
            self.pending_sums.index_add_(0, codes, rows)
        if self.settings.revive_after or self.settings.refresh:
            self.recent.append(rows)

    def codes(self, z: Tensor) -> Tensor:
        """Codes, b h w, of z, b d h w, which count for nothing."""
        return self.nearest(z, self.code_vectors(), note=False)

    def look_up(self, codes: Tensor) -> Tensor:
        """b h w to b d h w."""
        return look_up(codes, self.code_vectors())

    @never_compiled
    def join_calls(self, calls: int, b: int) -> None:
        """Makes one micro-batch of what the last `calls` calls of `nearest` over the same b images remember.

        The vectors go image by image, so that revival draws the same ones whether a batch came whole or in parts.
        """
        if self.training and self.settings.revive_after:
            passes = [self.recent.pop() for _ in range(min(calls, len(self.recent)))][::-1]
            by_image = torch.cat([rearrange(rows, "(b n) d -> b n d", b=b) for rows in passes], 1)
            self.recent.append(rearrange(by_image, "b n d -> (b n) d"))

    # ---- once per step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means over the latents, b d h w each, of all micro-batches and processes."""
        settings = self.settings
        if not settings.kmeans_iterations:
            return
        rows = [rearrange(z, "b d h w -> (b h w) d").contiguous() for z in batches]
        clusters = kmeans(rows, settings.size, settings.kmeans_iterations, spherical=settings.unit_length)
        self.codebook.copy_(clusters.centres)
        if settings.update == "ema":
            self.cluster_sizes.copy_(clusters.sizes.clamp(min=1))
            self.vector_sums.copy_(self.codebook * self.cluster_sizes.unsqueeze(1))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the vectors (ema) and revives dead codes."""
        counts = self.usage.step()
        self.steps_since_revival += 1
        if self.settings.update == "ema":
            self.move(counts, sum_over_processes(self.pending_sums))
        if self.settings.revive_after:
            self.revive_dead_codes()
        if self.settings.refresh and self.recent:
            self.refresh(counts)

        self.discard()

    @torch.no_grad()
    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`CodeUsage.health`, and the number of codes revived over the last epoch (`revived_codes`)."""
        revived = (self.steps_since_revival < self.usage.window(steps_per_epoch)).sum()
        return {**self.usage.health(steps_per_epoch), "revived_codes": revived}

    def move(self, counts: Tensor, sums: Tensor) -> None:
        """Moving averages of appendix A.1, with cluster sizes smoothed as in its authors' code (Sonnet)."""
        settings = self.settings
        self.cluster_sizes.lerp_(counts.float(), 1 - settings.decay)
        self.vector_sums.lerp_(sums, 1 - settings.decay)
        total, epsilon = self.cluster_sizes.sum(), settings.epsilon
        smoothed = (self.cluster_sizes + epsilon) * (total / (total + settings.size * epsilon))
        torch.div(self.vector_sums, smoothed.unsqueeze(1), out=self.codebook)
        if settings.unit_length:
            self.codebook.copy_(F.normalize(self.codebook, dim=1))

    def revive_dead_codes(self) -> None:
        """Puts random latents of this step in the place of dead codes."""
        settings = self.settings
        useless = self.usage.steps_since_use >= settings.revive_after
        if settings.revive_below:
            # A code for one odd image in thousands is never idle for long, and lies waste all the same.
            useless |= self.cluster_sizes < settings.revive_below * self.cluster_sizes.mean()
        dead = (useless & (self.steps_since_revival >= settings.revive_after)).nonzero().squeeze(1)
        if not len(dead) or not self.recent:
            return
        latents = draw_rows(self.recent, len(dead))
        dead = dead[: len(latents)]  # with fewer latents than dead codes the rest wait for the next step
        self.codebook[dead] = latents
        self.steps_since_revival[dead] = 0
        if settings.update == "ema":
            # With its old averages, all but zero, the next update would put the code somewhere else, and it would die
            # again. With a size at the bar of `revive_below`, its use from here on decides which side it falls to.
            size = (settings.revive_below * self.cluster_sizes.mean()).clamp(min=1)
            self.cluster_sizes[dead] = size
            self.vector_sums[dead] = latents * size

    def refresh(self, counts: Tensor) -> None:
        """Moves each vector to the latent of this step that is nearest to it: all of the way where it is out of use,
        hardly where it has even a hundredth of an even share (section 3.2 of CVQ-VAE, whose authors' code this follows
        in the constants). counts: k, of the step's latents."""
        decay, k = self.settings.decay, self.settings.size
        self.shares.lerp_(counts / counts.sum().clamp(min=1), 1 - decay)
        way = torch.exp(-10 * k * self.shares / (1 - decay) - 1e-3)
        vectors = self.code_vectors()
        rows = torch.cat(list(self.recent))
        nearest = rows[nearest_codes(vectors, rows)]  # k d, of this process
        distances = (nearest - vectors).square().sum(1)
        self.codebook.lerp_(rows_of_least(nearest, distances), way.unsqueeze(1))

    @torch.no_grad()
    def amend_average(self, average: Codebook) -> None:
        """See `training.ema`: where a latent has taken a vector's place, what that one was is none of its average."""
        if self.settings.revive_after:
            revived = (self.steps_since_revival == 0).unsqueeze(1)
            average.codebook.copy_(torch.where(revived, self.codebook, average.codebook))

    def discard(self) -> None:
        """Forgets what was noted since the last `update`."""
        self.usage.discard()
        if self.settings.update == "ema":
            self.pending_sums.zero_()
        self.recent.clear()

    def warnings(
        self, metrics: dict[str, float], steps_per_epoch: int, path: str, further_remedies: Sequence[str] = ()
    ) -> list[str]:
        """What a person should know about these figures of `health`; path: where the config has the codebook's
        fields."""
        settings = self.settings
        remedies = usage_remedies(settings.revive_after, settings.kmeans_iterations, steps_per_epoch, path)
        return self.usage.warnings(metrics, steps_per_epoch, [*remedies, *further_remedies])


def first_vectors(init: CodebookInit, k: int, d: int) -> Tensor:
    """k d: normal and of length 1 or so; uniform from -1/k to 1/k, as in VQ-GAN and what followed it, all of them near
    the origin; or normal of deviation 1."""
    if init == "uniform":
        return torch.empty(k, d).uniform_(-1 / k, 1 / k)
    vectors = torch.randn(k, d)
    return vectors / d**0.5 if init == "unit" else vectors


def rows_and_codes(z: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Of z, b d h w: its latents as rows, n d, and the code of each, n, among vectors k d."""
    rows = rearrange(z, "b d h w -> (b h w) d").contiguous()
    return rows, nearest_codes(rows, vectors)


def codes_as_map(codes: Tensor, z: Tensor) -> Tensor:
    """Codes, n, of all latents of z, b d h w: b h w."""
    b, _, h, w = z.shape
    return rearrange(codes, "(b h w) -> b h w", b=b, h=h, w=w)


def codes_of_map(z: Tensor, vectors: Tensor) -> Tensor:
    """Codes, b h w, of z, b d h w: for each latent the nearest of vectors k d."""
    return codes_as_map(rows_and_codes(z.detach(), vectors.detach())[1], z)


def look_up(codes: Tensor, vectors: Tensor) -> Tensor:
    """Codes b h w and vectors k d to b d h w, which lie place after place."""
    return rearrange(F.embedding(codes, vectors), "b h w d -> b d h w")
