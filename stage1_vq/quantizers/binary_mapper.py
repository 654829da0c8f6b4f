"""Binary mapper of the Free Transformer (Fleuret 2025, arXiv:2510.17558, section 3.4): bits are drawn, each with the
probability that its logit says, and the code that they make is one vector of a table.

The gradient to the logits is that of the mean over all codes with their probabilities; a divergence from fair bits
keeps the code from saying more than it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codes.spec import Codes
from common.compatibility import never_compiled
from common.draws import uniform
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.bits import TILE, bit_entropy, bits_to_codes, joint_probabilities
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.float32 import ProductConv2d

MOST_BITS = 16


@dataclass(frozen=True, kw_only=True)
class BinaryMapperConfig:
    """The paper has 16 bits, and thresholds from 1/4 bit to 2 bits a code."""

    kind: Literal["binary_mapper"] = "binary_mapper"
    bits: int = 10  # of a code: the vocabulary is 2^bits
    dim: int = 64  # width of z; other than bits: with a 1x1 convolution before
    embedding_dim: int | None = None  # width of z_q; null: dim
    temperature: float = 1.0  # of the probabilities in training that bits are drawn by
    kl_weight: float = 1.0  # of the divergence of a code's bits from fair ones, in nats, beyond the next
    free_nats: float = math.log(2)  # of each code, which cost nothing: a bit of information; all: bits * 0.693
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        rules = [
            ("bits", 1 <= self.bits <= MOST_BITS, f"from 1 to {MOST_BITS}"),
            ("dim", self.dim >= 1, "at least 1"),
            ("embedding_dim", self.embedding_dim is None or self.embedding_dim >= 1, "at least 1, or null for dim"),
            ("temperature", self.temperature > 0, "above 0; 1 is common"),
            ("kl_weight", self.kl_weight >= 0, "0 or more"),
            ("free_nats", self.free_nats >= 0, "0 or more; 0.693 is one bit"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
        ]
        check_fields(self, rules)


class BinaryMapper(CountingQuantizer):
    """z -> [1x1 convolution to bits] logits -> bits, drawn in training, else the likelier ones -> vector of the code.

    `codes` are of the more likely bits in both modes, first bit most significant. All in float32, also under autocast;
    z_q has the type of z.
    """

    config_class = BinaryMapperConfig
    codes_are_bits = True
    remedies = ("a higher {path}.free_nats", "fewer {path}.bits")

    def __init__(self, config: BinaryMapperConfig) -> None:
        width = config.embedding_dim or config.dim
        super().__init__(config.dim, 2**config.bits, config.warn_usage_below, dim_out=width)
        self.config = config
        self.project_in = ProductConv2d(config.dim, config.bits) if config.dim != config.bits else nn.Identity()
        self.embedding = nn.Embedding(2**config.bits, width)

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Training mode draws bits (common/draws.py). Losses: `kl_loss`, the divergence of a code's bits
        from fair ones in nats beyond `free_nats`, mean over codes, times its weight; statistics: `kl`, all of it."""
        with float32_island(z.device.type):
            logits = self.logits(z)
            codes = bits_to_codes(logits > 0)
            if self.training:
                self.usage.note(codes)
                chances = torch.sigmoid(logits.detach() / self.config.temperature)
                chosen = self.look_up(bits_to_codes(uniform(*logits.shape, device=z.device) < chances))
                expected = expected_vectors(logits, self.embedding.weight.detach())
                z_q = chosen + (expected - expected.detach())
            else:
                z_q = self.look_up(codes)
            kl = self.config.bits * math.log(2) - bit_entropy(logits).sum(1)
            losses = {}
            if self.config.kl_weight:
                losses["kl_loss"] = self.config.kl_weight * F.relu(kl - self.config.free_nats).mean()
            return Quantized(z_q.to(z.dtype), (codes,), losses, {"kl": kl.detach().mean()})

    def codes(self, z: Tensor) -> Codes:
        with float32_island(z.device.type):
            return (bits_to_codes(self.logits(z) > 0),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        return self.look_up(only)

    def logits(self, z: Tensor) -> Tensor:
        """b bits h w."""
        self.check_latents(z)
        return self.project_in(z.float())

    def look_up(self, codes: Tensor) -> Tensor:
        """b h w to b d h w."""
        return rearrange(self.embedding(codes), "b h w d -> b d h w")


def sum_of_vectors(logits: Tensor, vectors: Tensor) -> Tensor:
    return joint_probabilities(logits) @ vectors


@never_compiled  # the loop would be unrolled into the graph
def expected_vectors(logits: Tensor, vectors: Tensor) -> Tensor:
    """Mean of the vectors, 2**bits d, of all codes with their probabilities: b bits h w to b d h w. The table of all
    latents by all codes is there a tile at a time, and once more in the backward pass."""
    b, bits, h, w = logits.shape
    rows = rearrange(logits, "b bits h w -> (b h w) bits").split(max(1, TILE // 2**bits))
    parts = [checkpoint(sum_of_vectors, tile, vectors, use_reentrant=False, preserve_rng_state=False) for tile in rows]
    return rearrange(torch.cat(parts), "(b h w) d -> b d h w", b=b, h=h, w=w)
