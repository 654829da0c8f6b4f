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
from common.errors import UserError
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.nearest import Rotation, StraightThrough
from stage1_vq.quantizers.search import nearest_codes


@dataclass(frozen=True, kw_only=True)
class SimVQConfig:
    """The paper passes gradients straight through."""

    kind: Literal["simvq"] = "simvq"
    codebook_size: int = 8192  # k
    dim: int = 64  # d, width of z and z_q
    frozen_dim: int | None = None  # width of the random vectors; null: dim
    hidden_dim: int | None = None  # width of a layer with a ReLU inside the map; null: a linear map, as in the paper
    commitment_weight: float = 0.25  # beta: pulls the encoder's output to its code vector
    gradient: Literal["straight-through", "rotation"] = "straight-through"  # how gradients pass from z_q to z
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("codebook_size", self.codebook_size >= 2, "at least 2: one code carries no bits"),
            ("dim", self.dim >= 1, "at least 1"),
            ("frozen_dim", self.frozen_dim is None or self.frozen_dim >= 1, "at least 1, or null for dim"),
            ("hidden_dim", self.hidden_dim is None or self.hidden_dim >= 1, "at least 1, or null for a linear map"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more; 0.25 is common"),
            ("gradient", self.gradient in ("straight-through", "rotation"), "straight-through or rotation"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
        ):
            if not valid:
                raise UserError(f"model.quantizer.{name}={getattr(self, name)}, expected {expected}")


class SimVQuantizer(CountingQuantizer):
    """z -> nearest of the k code vectors, random vectors times the learned map -> z_q.

    All in float32, also under autocast; z_q has the type of z.
    """

    config_class = SimVQConfig
    remedies = ("a smaller model.quantizer.codebook_size", "a higher train.learning_rate")

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
        """z: b d h w. Losses, squared errors per element: `commitment_loss`, times its weight, and `codebook_loss`;
        statistics: `quantization_error`, the same without weight."""
        with torch.autocast(z.device.type, enabled=False):
            vectors, code_vectors = self.lookup_vectors(z), self.code_vectors()
            codes = self.nearest(vectors, code_vectors)
            if self.training:
                self.usage.note(codes)
            nearest = rearrange(F.embedding(codes, code_vectors), "b h w d -> b d h w")

            pass_gradient = StraightThrough if self.config.gradient == "straight-through" else Rotation
            z_q = pass_gradient.apply(vectors, nearest.detach()).to(z.dtype)
            losses = {"codebook_loss": F.mse_loss(nearest, vectors.detach())}
            if self.config.commitment_weight:
                losses["commitment_loss"] = self.config.commitment_weight * F.mse_loss(vectors, nearest.detach())
            return Quantized(z_q, (codes,), losses, {"quantization_error": losses["codebook_loss"].detach()})

    def codes(self, z: Tensor) -> Codes:
        with torch.autocast(z.device.type, enabled=False):
            return (self.nearest(self.lookup_vectors(z), self.code_vectors()),)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        (only,) = codes
        with torch.autocast(only.device.type, enabled=False):
            return rearrange(self.code_transform(F.embedding(only, self.frozen_codebook)), "b h w d -> b d h w")

    def lookup_vectors(self, z: Tensor) -> Tensor:
        """z, b d h w, where it is compared with the code vectors."""
        self.check_latents(z)
        return z.float()

    def code_vectors(self) -> Tensor:
        """k d."""
        return self.code_transform(self.frozen_codebook)

    def nearest(self, vectors: Tensor, code_vectors: Tensor) -> Tensor:
        """Codes, b h w, of vectors b d h w."""
        b, _, h, w = vectors.shape
        rows = rearrange(vectors.detach(), "b d h w -> (b h w) d").contiguous()
        return rearrange(nearest_codes(rows, code_vectors.detach()), "(b h w) -> b h w", b=b, h=h, w=w)
