"""Binary quantizer: each number of the latent becomes a bit (Murphy, "Probabilistic Machine Learning: Advanced Topics",
2023, section 21.6.1). In an autoencoder it makes a binary autoencoder.

The prior over the bits is uniform, so that the divergence from it is the same for all latents, and adds no loss. What
the book does not have is a small commitment loss: with the identity for a gradient, nothing else keeps latents near the
border, and they grow until no bit changes any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes, Grid
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.bit_groups import MOST_BITS_PER_CODE, BitGroups
from stage1_vq.quantizers.gradients import StraightThrough


@dataclass(frozen=True, kw_only=True)
class BinaryQuantizerConfig:
    """All bits of a position make one code, or several where there are many."""

    kind: Literal["binary"] = "binary"
    dim: int = 8  # bits at each position: width of z and z_q
    commitment_weight: float = 0.05  # pulls z to 1 where its bit is 1 and to -1 where it is 0; the book has 0
    bits_per_code: int = 16  # at most: a grid of codes for the first so many bits, another one for the next
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        rules = [
            ("dim", self.dim >= 1, "at least 1"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more"),
            ("bits_per_code", 1 <= self.bits_per_code <= MOST_BITS_PER_CODE, f"from 1 to {MOST_BITS_PER_CODE}"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
        ]
        check_fields(self, rules)


class BinaryQuantizer(Quantizer):
    """z_q is 1 where z is above 0, and 0 elsewhere; gradients pass straight through.

    Codes: the bits of a position as a number, first bit most significant, `bits_per_code` of them in each grid.
    """

    config_class = BinaryQuantizerConfig
    codes_are_bits = True

    def __init__(self, config: BinaryQuantizerConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        self.usage = BitGroups(config.dim, config.bits_per_code, config.warn_usage_below, "codes")

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        names = ["codes"] if len(self.usage) == 1 else self.usage.names
        return tuple(Grid(name, height, width, 2**bits) for name, bits in zip(names, self.usage.sizes, strict=True))

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses: `commitment_loss`, the squared error of z beside -1 and 1 per bit, times its weight;
        statistics: `quantization_error`, the same without weight."""
        self.check_latents(z)
        with float32_island(z.device.type):
            bits = z.detach() > 0
            codes = self.usage.codes(bits)
            if self.training:
                self.usage.note(codes)
            sides = 2 * bits.float() - 1
            losses, statistics = {}, {"quantization_error": F.mse_loss(z.detach().float(), sides)}
            if self.config.commitment_weight:
                losses["commitment_loss"] = self.config.commitment_weight * F.mse_loss(z.float(), sides)
            return Quantized(StraightThrough.apply(z, bits.to(z.dtype)), codes, losses, statistics)

    def codes(self, z: Tensor) -> Codes:
        self.check_latents(z)
        return self.usage.codes(z > 0)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        return self.usage.bits(codes).float()

    def update(self) -> None:
        self.usage.step()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """That of `BitGroups`."""
        return self.usage.health(steps_per_epoch)

    def discard(self) -> None:
        self.usage.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        return self.usage.warnings(metrics, steps_per_epoch, [f"a smaller {self.path}.dim"])
