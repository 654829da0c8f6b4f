"""What a quantizer does whose code vectors a learned map makes of a table: the nearest of them, by gradient alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor

from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.codebook import codes_of_map, look_up
from stage1_vq.quantizers.gradients import GRADIENTS, Gradient, pass_gradient
from stage1_vq.quantizers.usage import CodeUsage


class MappedFields(Protocol):
    """The fields by which their configs speak of it."""

    @property
    def codebook_size(self) -> int: ...  # k
    @property
    def dim(self) -> int: ...  # d, width of z and z_q
    @property
    def commitment_weight(self) -> float: ...
    @property
    def gradient(self) -> str: ...
    @property
    def warn_usage_below(self) -> float: ...


def mapped_rules(config: MappedFields, gradients: Sequence[str] = tuple(GRADIENTS)) -> list[tuple[str, bool, str]]:
    """For `common.errors.check_fields`. gradients: those that it knows."""
    return [
        ("codebook_size", config.codebook_size >= 2, "at least 2: one code carries no bits"),
        ("dim", config.dim >= 1, "at least 1"),
        ("commitment_weight", config.commitment_weight >= 0, "0 or more; 0.25 is common"),
        ("gradient", config.gradient in gradients, f"one of {', '.join(gradients)}"),
        ("warn_usage_below", 0 <= config.warn_usage_below <= 1, "a share from 0 to 1"),
    ]


def nearest_mapped(config: MappedFields, z: Tensor, vectors: Tensor, usage: CodeUsage | None) -> Quantized:
    """z: b d h w; vectors: k d, float32, with their graph; usage: what notes the codes, None: nobody.

    config.gradient: one of `GRADIENTS`. To be called inside `float32_island`; z_q has the type of z. Losses, squared
    errors per element: `commitment_loss`, times its weight, and `codebook_loss`; statistics: `quantization_error`, the
    same without weight.
    """
    latents = z.float()
    codes = codes_of_map(latents, vectors)
    if usage is not None:
        usage.note(codes)
    nearest = look_up(codes, vectors)
    z_q = pass_gradient(cast(Gradient, config.gradient), latents, nearest.detach()).to(z.dtype)
    losses = {"codebook_loss": F.mse_loss(nearest, latents.detach())}
    if config.commitment_weight:
        losses["commitment_loss"] = config.commitment_weight * F.mse_loss(latents, nearest.detach())
    return Quantized(z_q, (codes,), losses, {"quantization_error": losses["codebook_loss"].detach()})
