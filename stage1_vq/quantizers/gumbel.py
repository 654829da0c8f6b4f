"""Gumbel-softmax quantizer (Jang et al. 2016, arXiv:1611.01144), with the schedules of DALL-E's discrete VAE (Ramesh et
al. 2021, arXiv:2102.12092, appendix A.2): a posterior over the codes of each position, sampled with a temperature that
falls, and its divergence from the uniform prior with a weight that rises.

For short runs, by choice, the diversity loss of wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477, equation 4) and a
start from k-means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes
from common.distributed import global_mean, mean_over_processes
from common.draws import exponential_like
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.bits import entropy
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.kmeans import kmeans
from stage1_vq.quantizers.search import nearest_codes

SURENESS = 2.0  # after k-means: what the mean squared distance of a latent to its own centre takes off its logit


@dataclass(frozen=True, kw_only=True)
class GumbelQuantizerConfig:
    """The schedules are those of the DALL-E paper. Its loss, a sum over the image divided by 256 * 256 * 3 numbers,
    has the weight 6.6 / 192 for the divergence as a mean over its 32 x 32 codes."""

    kind: Literal["gumbel"] = "gumbel"
    codebook_size: int = 8192  # k
    dim: int = 64  # width of z
    embedding_dim: int | None = None  # d, width of z_q; null: dim
    sample: Literal["soft", "straight-through"] = "soft"  # z_q in training: a mixture of codes, or one code
    temperature_start: float = 1.0  # of the softmax
    temperature_end: float = 0.0625  # of the softmax, from step temperature_steps on
    temperature_steps: int = 150000  # over which it falls, as half a cosine wave
    kl_weight: float = 0.034375  # of the divergence from the uniform prior in nats per code, from kl_warmup_steps on
    kl_warmup_steps: int = 5000  # over which its weight rises from 0, linearly
    diversity_weight: float = 0.0  # of minus the entropy of the batch's mean posterior, in nats; wav2vec 2.0 has 0.1
    kmeans_iterations: int = 0  # on the first batch's latents, to start from their nearest codes; 0: the paper's noise
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns
    init: Literal["normal", "dalle"] = "normal"  # code vectors at first: normal(0, 1); or, with the logits, DALL-E's

    def __post_init__(self) -> None:
        rules = [
            ("codebook_size", self.codebook_size >= 2, "at least 2: one code carries no bits"),
            ("dim", self.dim >= 1, "at least 1"),
            ("embedding_dim", self.embedding_dim is None or self.embedding_dim >= 1, "at least 1, or null for dim"),
            ("sample", self.sample in ("soft", "straight-through"), "soft or straight-through"),
            ("temperature_start", self.temperature_start > 0, "above 0; the paper has 1"),
            ("temperature_end", self.temperature_end > 0, "above 0; the paper has 0.0625"),
            ("temperature_steps", self.temperature_steps >= 0, "0 (temperature_end at once) or a number of steps"),
            ("kl_weight", self.kl_weight >= 0, "0 or more"),
            ("kl_warmup_steps", self.kl_warmup_steps >= 0, "0 (kl_weight at once) or a number of steps"),
            ("diversity_weight", self.diversity_weight >= 0, "0 or more; wav2vec 2.0 has 0.1"),
            ("kmeans_iterations", self.kmeans_iterations >= 0, "0 or more"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
            ("init", self.init in ("normal", "dalle"), "normal or dalle"),
        ]
        check_fields(self, rules)


class GumbelQuantizer(CountingQuantizer):
    """z -> 1x1 convolution to k logits -> code. In training mode z_q is a sample of the relaxed posterior; else it is
    the vector of the most likely code, which is what `codes` are in both.

    All in float32, also under autocast; z_q has the type of z.
    """

    config_class = GumbelQuantizerConfig
    updates: Tensor  # scalar, int64: the step that the schedules are at; between two steps that of the next

    def __init__(self, config: GumbelQuantizerConfig) -> None:
        width = config.embedding_dim or config.dim
        super().__init__(config.dim, config.codebook_size, config.warn_usage_below, dim_out=width)
        self.config = config
        self.logits = ProductConv2d(config.dim, config.codebook_size)
        self.embedding = nn.Embedding(config.codebook_size, width)
        if config.init == "dalle":
            # As there the logits, and the decoder's first layer as a convolution of one-hot codes: outputs begin with
            # the variance of their inputs, code vectors with that of 1 / k.
            nn.init.normal_(self.logits.weight, std=config.dim**-0.5)
            nn.init.zeros_(self.logits.get_parameter("bias"))
            nn.init.normal_(self.embedding.weight, std=config.codebook_size**-0.5)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        remedies = [f"a smaller {self.path}.codebook_size"]
        if not self.config.kmeans_iterations:
            remedies.append(f"{self.path}.kmeans_iterations=10")
        if not self.config.diversity_weight:
            remedies.append(f"{self.path}.diversity_weight=0.1")
        return self.usage.warnings(metrics, steps_per_epoch, remedies)

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Training mode draws noise (common/draws.py). Losses: `kl_loss`, the
        divergence of the posterior from the uniform prior in nats, mean over codes, times the weight of this step; in
        training mode `diversity_loss`, minus the entropy of the batch's mean posterior in nats, times its weight.
        Statistics: `temperature`, and the figures without weights, `kl` and `batch_entropy`, if they are computed."""
        with float32_island(z.device.type):
            logits = self.logits_of(z)
            codes = logits.argmax(1)
            if self.training:
                self.usage.note(codes)
                places = exponential_like(logits.movedim(1, -1))  # b h w k: as the logits of a CPU lie in memory
                noise = -places.log().movedim(-1, 1)
                z_q = self.sample(logits, noise, self.temperature())
            else:
                z_q = self.codes_to_latents((codes,))

            losses, statistics = {}, {"temperature": self.temperature()}
            if self.config.kl_weight:
                kl = divergence_from_uniform(logits)
                losses["kl_loss"] = self.kl_weight() * kl
                statistics["kl"] = kl.detach()
            if self.training and self.config.diversity_weight:
                batch_entropy = entropy(global_mean(place_by_place(logits).softmax(3).mean((0, 1, 2))))
                losses["diversity_loss"] = -self.config.diversity_weight * batch_entropy
                statistics["batch_entropy"] = batch_entropy.detach()
            return Quantized(z_q.to(z.dtype), (codes,), losses, statistics)

    def codes(self, z: Tensor) -> Codes:
        with float32_island(z.device.type):
            return (self.logits_of(z).argmax(1),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        return rearrange(self.embedding(only), "b h w d -> b d h w")

    def logits_of(self, z: Tensor) -> Tensor:
        """b k h w."""
        self.check_latents(z)
        return self.logits(z.float())

    def sample(self, logits: Tensor, noise: Tensor, temperature: Tensor | float) -> Tensor:
        """z_q, b d h w, of logits and standard Gumbel noise, both b k h w.

        The code vectors weighted by softmax((logits + noise) / temperature); with config.sample "straight-through"
        that is so for the gradient to the logits only, and z_q is the vector of the largest weight.
        """
        weights = place_by_place((logits + noise) / temperature).softmax(3)
        if self.config.sample == "soft":
            return rearrange(weights @ self.embedding.weight, "b h w d -> b d h w")
        drawn = self.codes_to_latents((weights.argmax(3),))
        mixture = rearrange(weights @ self.embedding.weight.detach(), "b h w d -> b d h w")
        return drawn + (mixture - mixture.detach())

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """k-means over the latents, b d h w each, of all micro-batches and processes: the logits become minus squared
        distances to the centres, and the code vectors, where they are as wide as z, the centres themselves.

        Small random logits drown in the noise of the samples: the decoder learns to do without codes before they mean
        anything, and short runs never come back from there. Scaled by SURENESS, noise moves a latent to codes nearby.
        """
        if not self.config.kmeans_iterations:
            return
        k = self.config.codebook_size
        rows = [rearrange(z.float(), "b d h w -> (b h w) d").contiguous() for z in batches]
        centres, _ = kmeans(rows, k, self.config.kmeans_iterations)
        errors = [F.mse_loss(centres[nearest_codes(part, centres)], part) for part in rows]
        distance = self.config.dim * mean_over_processes(torch.stack(errors).mean())
        scale = SURENESS / distance.clamp(min=1e-6)
        # -scale |z - c|^2 is this and a term that all codes share.
        self.logits.weight.copy_(rearrange(2 * scale * centres, "k d -> k d 1 1"))
        self.logits.get_parameter("bias").copy_(-scale * centres.square().sum(1))
        if self.dim_out == self.dim:
            self.embedding.weight.copy_(centres)

    # ---- schedules --------------------------------------------------------------------------------------------------

    def temperature(self) -> Tensor:
        """Of this step: a scalar."""
        start, end = self.config.temperature_start, self.config.temperature_end
        return end + (start - end) * (1 + torch.cos(math.pi * self.progress(self.config.temperature_steps))) / 2

    def kl_weight(self) -> Tensor:
        """Of this step: a scalar."""
        return self.config.kl_weight * self.progress(self.config.kl_warmup_steps)

    def progress(self, steps: int) -> Tensor:
        """Share done of a schedule of so many steps: a scalar from 0 to 1."""
        return (self.updates / steps).clamp(max=1) if steps else torch.ones_like(self.updates, dtype=torch.float32)

    def begin_step(self, step: int) -> None:
        # A buffer, as a compiled forward pass may read it and not be compiled anew for each step; in the state dict, as
        # it has been in that of every model, whose fingerprint it is part of.
        self.updates.fill_(step)

    def update(self) -> None:
        self.updates += 1
        super().update()


def divergence_from_uniform(logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(logits), b k h w, from the uniform distribution: nats, mean over codes."""
    log_probabilities = place_by_place(logits).log_softmax(3)
    return (log_probabilities.exp() * log_probabilities).sum(3).mean() + math.log(logits.shape[1])


def place_by_place(logits: Tensor) -> Tensor:
    """b k h w to b h w k, of whose last axis a softmax takes no copy where logits lie so (common/layout.py)."""
    return rearrange(logits, "b k h w -> b h w k")
