"""Index backpropagation quantization (Shi et al. 2024, arXiv:2412.02692): the code of the largest inner product; in the
backward pass, its softmax over the whole codebook. Each step moves all code vectors, so that a large codebook of wide
vectors stays in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes
from common.distributed import global_mean
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.bits import entropy
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.search import codes_of_largest_product
from stage1_vq.quantizers.soft_codes import index_backpropagation, soft_statistics


@dataclass(frozen=True, kw_only=True)
class IBQConfig:
    """The paper's largest codebook is 262,144 codes of width 256."""

    kind: Literal["ibq"] = "ibq"
    codebook_size: int = 16384  # k
    dim: int = 256  # d, width of z and z_q
    commitment_weight: float = 0.25  # beta: pulls the encoder's output to its code vector; its authors' code has 1
    codebook_weight: float = 1.0  # of the loss that pulls code vectors to latents; its authors' code has beta, 0.25
    entropy_weight: float = 0.05  # of both entropy terms: each latent sure of its code, all codes in use
    diversity: float = 1.0  # weight of the second entropy term relative to the first
    temperature: float = 0.01  # of the softmax that the entropies are those of
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        rules = [
            ("codebook_size", self.codebook_size >= 2, "at least 2: one code carries no bits"),
            ("dim", self.dim >= 1, "at least 1"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more; 0.25 is common"),
            ("codebook_weight", self.codebook_weight >= 0, "0 or more"),
            ("entropy_weight", self.entropy_weight >= 0, "0 (no entropy terms) or more"),
            ("diversity", self.diversity >= 0, "0 (first entropy term only) or more"),
            ("temperature", self.temperature > 0, "above 0; 0.01 is common"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
        ]
        check_fields(self, rules)


class IBQuantizer(CountingQuantizer):
    """z -> code vector with the largest inner product -> z_q. No gradient passes straight through: z learns from z_q
    by its place among the codes, and from the losses.

    All in float32, also under autocast; z_q has the type of z.
    """

    config_class = IBQConfig
    remedies = ("a higher {path}.entropy_weight", "a smaller {path}.codebook_size")

    def __init__(self, config: IBQConfig) -> None:
        super().__init__(config.dim, config.codebook_size, config.warn_usage_below)
        self.config = config
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.dim))  # k d

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses, squared errors per element: between z and z_q, with the gradients of the index
        (`index_loss`); and between z and the code vector, times their weights, to the codebook (`codebook_loss`) and
        to z (`commitment_loss`). In training mode, times their weights and in nats: `entropy_loss`, the entropy of the
        soft assignment, mean over latents, and `diversity_loss`, minus the entropy of its mean over latents.
        Statistics: `quantization_error`, and the entropies without weights, `sample_entropy` and `batch_entropy`."""
        with float32_island(z.device.type):
            b, _, h, w = z.shape
            vectors = self.rows(z)  # n d
            numbers = codes_of_largest_product(vectors.detach(), self.codebook.detach())
            codes = rearrange(numbers, "(b h w) -> b h w", b=b, h=h, w=w)
            if self.training:
                self.usage.note(codes)
            indexed = index_backpropagation(vectors, self.codebook, numbers)
            z_q = rearrange(indexed, "(b h w) d -> b d h w", b=b, h=h, w=w).to(z.dtype)

            code_vectors = F.embedding(numbers, self.codebook)
            error = F.mse_loss(code_vectors, vectors.detach())
            losses = {"index_loss": F.mse_loss(indexed, vectors), "codebook_loss": self.config.codebook_weight * error}
            statistics = {"quantization_error": error.detach()}
            if self.config.commitment_weight:
                losses["commitment_loss"] = self.config.commitment_weight * F.mse_loss(vectors, code_vectors.detach())
            if self.training and self.config.entropy_weight:
                sample_entropy, usage = soft_statistics(vectors, self.codebook, 1 / self.config.temperature)
                losses["entropy_loss"] = self.config.entropy_weight * sample_entropy
                statistics["sample_entropy"] = sample_entropy.detach()
                if self.config.diversity:
                    batch_entropy = entropy(global_mean(usage))
                    losses["diversity_loss"] = -self.config.entropy_weight * self.config.diversity * batch_entropy
                    statistics["batch_entropy"] = batch_entropy.detach()
            return Quantized(z_q, (codes,), losses, statistics)

    def codes(self, z: Tensor) -> Codes:
        b, _, h, w = z.shape
        with float32_island(z.device.type):
            numbers = codes_of_largest_product(self.rows(z).detach(), self.codebook.detach())
            return (rearrange(numbers, "(b h w) -> b h w", b=b, h=h, w=w),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        return rearrange(F.embedding(only, self.codebook), "b h w d -> b d h w")

    def rows(self, z: Tensor) -> Tensor:
        """b d h w to b*h*w d."""
        self.check_latents(z)
        return rearrange(z.float(), "b d h w -> (b h w) d").contiguous()
