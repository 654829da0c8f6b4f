"""FVQ (Chang et al. 2025, arXiv:2509.10140): the code vectors are what a small vision transformer, VQBridge, makes of a
table that learns. Each step moves all code vectors through its weights, so that none is left behind; SimVQ's linear map
is the smallest of such bridges.

The bridge compresses neighbouring rows of the table to one token, processes the tokens, and recovers a row of each part
of a token. What it makes is added to the table, so that it begins as a small change. Its paper's other half, learning
annealing, is `train.schedule=cosine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes
from common.compatibility import never_compiled
from common.errors import check_fields
from common.float32 import float32_island, full_precision
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.codebook import codes_of_map, look_up
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.diveq import directional_step
from stage1_vq.quantizers.gradients import GRADIENTS, Gradient
from stage1_vq.quantizers.mapped import mapped_rules, nearest_mapped


@dataclass(frozen=True, kw_only=True)
class FVQConfig:
    """The paper's codebooks have 16,384 to 262,144 codes."""

    kind: Literal["fvq"] = "fvq"
    codebook_size: int = 16384  # k
    dim: int = 64  # d, width of z and z_q
    patch: int = 16  # rows of the table to a token of the bridge
    width: int = 256  # of the bridge's tokens
    blocks: int = 2  # of the bridge
    heads: int = 4  # of its attention
    commitment_weight: float = 0.25  # beta: pulls the encoder's output to its code vector
    # How gradients pass from z_q to z; by DiVeQ's step (arXiv:2509.26469) also to the table, with no loss of its own.
    gradient: Gradient | Literal["diveq"] = "straight-through"
    noise: float = 1e-3  # standard deviation of what that step's direction is changed by (gradient=diveq)
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        rules = [
            *mapped_rules(self, (*GRADIENTS, "diveq")),
            ("patch", self.patch >= 1 and self.codebook_size % self.patch == 0, "a divisor of codebook_size"),
            ("heads", self.heads >= 1, "at least 1"),
            ("width", self.width >= 1 and self.width % self.heads == 0, "a multiple of heads"),
            ("blocks", self.blocks >= 0, "0 (compress and recover alone) or more"),
            ("noise", self.noise >= 0, "0 (straight to the code vector) or more; 0.001 is common"),
        ]
        check_fields(self, rules)


class Block(nn.Module):
    """Tokens t d -> t d: attention and MLP, each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.attention_norm(tokens)), "t (three heads d) -> three heads t d", three=3, heads=self.heads
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "heads t d -> t (heads d)")
        tokens = tokens + self.out(attended)
        return tokens + self.mlp(self.mlp_norm(tokens))


class Bridge(nn.Module):
    """A table, k d, to code vectors, k d: compress, process, recover, and add."""

    def __init__(self, config: FVQConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.compress = nn.Linear(config.patch * config.dim, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(config.codebook_size // config.patch, config.width))
        self.blocks = nn.Sequential(*(Block(config.width, config.heads) for _ in range(config.blocks)))
        self.norm = nn.LayerNorm(config.width)
        self.recover = nn.Linear(config.width, config.patch * config.dim)
        nn.init.normal_(self.recover.weight, std=0.1 * config.dim**-0.5 * config.width**-0.5)
        nn.init.zeros_(self.recover.bias)

    def forward(self, table: Tensor) -> Tensor:
        tokens = self.compress(rearrange(table, "(t p) d -> t (p d)", p=self.patch)) + self.positions
        processed = self.recover(self.norm(self.blocks(tokens)))
        return table + rearrange(processed, "t (p d) -> (t p) d", p=self.patch)


class FVQuantizer(CountingQuantizer):
    """z -> nearest of the k code vectors, the learned table seen through the bridge -> z_q.

    All in float32, also under autocast; z_q has the type of z.
    """

    config_class = FVQConfig
    remedies = ("a smaller {path}.codebook_size", "a higher train.learning_rate")

    def __init__(self, config: FVQConfig) -> None:
        super().__init__(config.dim, config.codebook_size, config.warn_usage_below)
        self.config = config
        self.table = nn.Parameter(torch.randn(config.codebook_size, config.dim) / config.dim**0.5)  # k d
        self.bridge: nn.Module = Bridge(config)

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses and statistics: those of `nearest_mapped`; with gradient=diveq no losses."""
        self.check_latents(z)
        usage = self.usage if self.training else None
        with float32_island(z.device.type):
            if self.config.gradient != "diveq":
                return nearest_mapped(self.config, z, self.code_vectors(), usage)
            latents, vectors = z.float(), self.code_vectors()
            codes = codes_of_map(latents, vectors)
            if usage is not None:
                usage.note(codes)
            nearest = look_up(codes, vectors)
            statistics = {"quantization_error": F.mse_loss(nearest.detach(), latents.detach())}
            if self.training:
                nearest = latents + directional_step(latents, nearest, self.config.noise)
            return Quantized(nearest.to(z.dtype), (codes,), {}, statistics)

    def codes(self, z: Tensor) -> Codes:
        self.check_latents(z)
        with float32_island(z.device.type):
            return (codes_of_map(z.float(), self.code_vectors()),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        with float32_island(only.device.type):
            return look_up(only, self.code_vectors())

    @never_compiled  # compiled, the products would take the precision of the others
    def code_vectors(self) -> Tensor:
        """The code vectors, k d."""
        with full_precision():
            return self.bridge(self.table)
