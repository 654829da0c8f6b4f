"""SimVQ (Zhu et al. 2024, arXiv:2411.02038): the codebook is random vectors that never change, seen through a linear
map that learns. Each gradient moves all code vectors together, so that none is left behind to die."""

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
from stage1_vq.quantizers.codebook import codes_of_map
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.gradients import Gradient
from stage1_vq.quantizers.mapped import mapped_rules, nearest_mapped


@dataclass(frozen=True, kw_only=True)
class SimVQConfig:
    """The paper passes gradients straight through."""

    kind: Literal["simvq"] = "simvq"
    codebook_size: int = 8192  # k
    dim: int = 64  # d, width of z and z_q
    frozen_dim: int | None = None  # width of the random vectors; null: dim
    hidden_dim: int | None = None  # width of a layer with a ReLU inside the map; null: a linear map, as in the paper
    commitment_weight: float = 0.25  # beta: pulls the encoder's output to its code vector
    gradient: Gradient = "straight-through"  # how gradients pass from z_q to z
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        rules = [
            *mapped_rules(self),
            ("frozen_dim", self.frozen_dim is None or self.frozen_dim >= 1, "at least 1, or null for dim"),
            ("hidden_dim", self.hidden_dim is None or self.hidden_dim >= 1, "at least 1, or null for a linear map"),
        ]
        check_fields(self, rules)


class SimVQuantizer(CountingQuantizer):
    """z -> nearest of the k code vectors, random vectors times the learned map -> z_q.

    All in float32, also under autocast; z_q has the type of z.
    """

    config_class = SimVQConfig
    remedies = ("a smaller {path}.codebook_size", "a higher train.learning_rate")

    frozen_codebook: Tensor  # k frozen_dim

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__(config.dim, config.codebook_size, config.warn_usage_below)
        self.config = config
        width = config.frozen_dim or config.dim
        self.register_buffer("frozen_codebook", torch.randn(config.codebook_size, width) / width**0.5)
        self.code_transform: nn.Module = nn.Linear(width, config.dim, bias=False)
        if hidden := config.hidden_dim:
            self.code_transform = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, config.dim))

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses and statistics: those of `nearest_mapped`."""
        self.check_latents(z)
        with float32_island(z.device.type):
            return nearest_mapped(self.config, z, self.code_vectors(), self.usage if self.training else None)

    def codes(self, z: Tensor) -> Codes:
        self.check_latents(z)
        with float32_island(z.device.type):
            return (codes_of_map(z.float(), self.code_vectors()),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        with float32_island(only.device.type):
            return rearrange(self.code_transform(F.embedding(only, self.frozen_codebook)), "b h w d -> b d h w")

    @never_compiled  # compiled, the product would take the precision of the others
    def code_vectors(self) -> Tensor:
        """The code vectors, k d."""
        with full_precision():
            return self.code_transform(self.frozen_codebook)
