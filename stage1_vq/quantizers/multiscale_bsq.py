"""Multi-scale binary spherical quantizer of Infinity (Han et al. 2024, arXiv:2412.04431, section 3.2): the scales of
VAR, whose codes are bits, the signs of what the coarser scales left, at length 1 together (BSQ, Zhao et al. 2024,
arXiv:2406.07548). So a vocabulary may have 2^64 entries, and none of it is ever a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from codes.spec import Codes, Grid
from common.distributed import global_mean
from common.errors import UserError, check_fields
from common.float32 import float32_island
from common.wording import counted
from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.bit_groups import MOST_BITS_PER_CODE, BitGroups
from stage1_vq.quantizers.bits import bit_entropy, entropy
from stage1_vq.quantizers.gradients import StraightThrough
from stage1_vq.quantizers.scales import scale_sizes
from stage1_vq.squared_error import squared_error


@dataclass(frozen=True, kw_only=True)
class MultiscaleBSQConfig:
    """The scales are the published ones of 256x256 pixels. All bits of a place make one code, or several where there
    are many."""

    kind: Literal["multiscale_bsq"] = "multiscale_bsq"
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16)  # sides of the grids, coarse to fine: the last is h = w
    dim: int = 32  # bits at each place of each scale: width of z and z_q
    commitment_weight: float = 0.25  # pulls the latents to the sum of the scales
    entropy_weight: float = 0.1  # of both entropy terms: each bit sure of its side, both sides in use
    diversity: float = 1.0  # gamma: weight of the second entropy term relative to the first
    inverse_temperature: float = 10.0  # of the soft assignment that the entropies are those of
    bits_per_code: int = 8  # at most: a grid of codes for the first so many bits of a scale, another one for the next
    warn_usage_below: float = 0.0  # share of codes used in an epoch below which the log warns; of many bits few are

    def __post_init__(self) -> None:
        rising = min(self.scales, default=0) >= 1 and list(self.scales) == sorted(set(self.scales))
        rules = [
            ("scales", rising, "one or more rising sides from 1 on, such as 1, 2, 4, 8"),
            ("dim", self.dim >= 1, "at least 1"),
            ("commitment_weight", self.commitment_weight >= 0, "0 or more"),
            ("entropy_weight", self.entropy_weight >= 0, "0 (no entropy terms) or more"),
            ("diversity", self.diversity >= 0, "0 (first entropy term only) or more"),
            ("inverse_temperature", self.inverse_temperature > 0, "above 0"),
            ("bits_per_code", 1 <= self.bits_per_code <= MOST_BITS_PER_CODE, f"from 1 to {MOST_BITS_PER_CODE}"),
            ("warn_usage_below", 0 <= self.warn_usage_below <= 1, "a share from 0 to 1"),
        ]
        check_fields(self, rules)


class MultiscaleBSQuantizer(Quantizer):
    """With f the latents, and from scale 1 to S of them:

        rest = area-average of f - sum on the grid of scale s
        bits_s = rest > 0
        sum = sum + bilinear up-sampling of +-1/sqrt(d), by the bits

    z_q is the last sum, with the gradient passed straight to z. Codes: the bits of a place as a number, first bit most
    significant, `bits_per_code` of them in each grid. All of it in float32.
    """

    config_class = MultiscaleBSQConfig
    codes_are_bits = True

    def __init__(self, config: MultiscaleBSQConfig) -> None:
        super().__init__(config.dim)
        self.config = config
        self.corner = config.dim**-0.5
        self.usage = BitGroups(config.dim, config.bits_per_code, config.warn_usage_below, "bits")  # of each scale

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """Of each scale one or several, `scale0` or `scale0_bits0` first."""
        groups = [""] if len(self.usage) == 1 else [f"_{name}" for name in self.usage.names]
        return tuple(
            Grid(f"scale{scale}{group}", h, w, 2**bits)
            for scale, (h, w) in enumerate(scale_sizes(self.config.scales, height, width))
            for group, bits in zip(groups, self.usage.sizes, strict=True)
        )

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses, each times its weight: `commitment_loss`, the squared error per element of the sum after
        each scale, averaged over the scales; in training mode `entropy_loss`, the entropy of each bit's soft
        assignment, and `diversity_loss`, minus the entropy of its mean over all places and images, both in nats for all
        bits of a place, averaged over the scales. Statistics: `quantization_error`, that of the last scale, and the
        entropies without weights, `sample_entropy` and `batch_entropy`."""
        self.check_latents(z)
        with float32_island(z.device.type):
            latents, config = z.float(), self.config
            rests, sums, codes = self.walk(latents)
            if self.training:
                self.usage.note(codes)
            statistics = {"quantization_error": squared_error(latents, sums[-1]).detach()}
            losses: dict[str, Tensor] = {}
            if config.commitment_weight:
                errors = torch.stack([squared_error(latents, total) for total in sums])
                losses["commitment_loss"] = config.commitment_weight * errors.mean()
            if self.training and config.entropy_weight:
                found = torch.stack([torch.stack(self.entropies(rest)) for rest in rests]).mean(0)
                statistics |= {"sample_entropy": found[0].detach(), "batch_entropy": found[1].detach()}
                losses["entropy_loss"] = config.entropy_weight * found[0]
                if config.diversity:
                    losses["diversity_loss"] = -config.entropy_weight * config.diversity * found[1]
            z_q = StraightThrough.apply(latents, sums[-1]).to(z.dtype)
            return Quantized(z_q, codes, losses, statistics)

    def walk(self, z: Tensor, chosen: Codes = ()) -> tuple[list[Tensor], list[Tensor], Codes]:
        """Of each scale what it has to describe, b d h_s w_s with a gradient to z, and the sum after it, b d h w
        without one; and all codes. chosen: as for `codes_after`."""
        total, codes = torch.zeros_like(z), chosen
        rests, sums = list[Tensor](), list[Tensor]()
        for scale, size in enumerate(scale_sizes(self.config.scales, *z.shape[2:])):
            rests.append(self.shrink(z - total, size))
            own, first = self.usage.codes(rests[-1].detach() > 0), scale * len(self.usage)
            codes = (*codes, *own[max(0, len(codes) - first) :])
            total = total + self.grow(self.usage.bits(codes[first : first + len(own)]), z.shape[2:])
            sums.append(total)
        return rests, sums, codes

    def codes(self, z: Tensor) -> Codes:
        return self.codes_after(z, ())

    @torch.no_grad()
    def codes_after(self, z: Tensor, chosen: Codes) -> Codes:
        """Each scale describes what the ones before it, as they were chosen, leave of z: after bits that were flipped
        these are the labels of bitwise self-correction (section 3.4)."""
        self.check_latents(z)
        with float32_island(z.device.type):
            return self.walk(z.float(), chosen)[2]

    def codes_to_latents(self, codes: Codes) -> Tensor:
        height, width = codes[-1].shape[1:]
        return self.latents_of_first(codes, height, width)

    def latents_of_first(self, codes: Codes, height: int, width: int) -> Tensor:
        groups = len(self.usage)
        if len(codes) % groups:
            raise UserError(
                f"got codes of {counted(len(codes), 'grid')}, expected a multiple of {groups}: the bits of each "
                f"scale of this model lie in {groups} grids"
            )
        with float32_island(codes[0].device.type):
            total = torch.zeros(len(codes[0]), self.dim, height, width, device=codes[0].device)
            for start in range(0, len(codes), groups):
                total = total + self.grow(self.usage.bits(codes[start : start + groups]), (height, width))
            return total

    def shrink(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x, b d h w, averaged on a grid of `size`."""
        return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="area")

    def grow(self, bits: Tensor, size: Sequence[int]) -> Tensor:
        """What the bits of a scale, b d h_s w_s, add to a map of `size`: b d *size."""
        x = (2 * bits.float() - 1) * self.corner
        return x if x.shape[2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="bilinear")

    def entropies(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """In nats, of all bits of a place: the mean over places and images of the entropy of their soft assignment, and
        the entropy of its mean over those of all processes. rest: b d h w; the soft assignment is of its directions."""
        logits = 4 * self.config.inverse_temperature * self.corner * F.normalize(rest, dim=1)
        rows = rearrange(logits, "b d h w -> (b h w) d")
        ones = global_mean(torch.sigmoid(rows).mean(0))
        return bit_entropy(rows).sum(1).mean(), entropy(torch.stack([ones, 1 - ones], 1)).sum()

    # ---- the use of codes, once per step ----------------------------------------------------------------------------

    def update(self) -> None:
        self.usage.step()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """That of `BitGroups`."""
        return self.usage.health(steps_per_epoch)

    def discard(self) -> None:
        self.usage.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        remedies = (f"a higher {self.path}.entropy_weight", f"a smaller {self.path}.dim")
        return self.usage.warnings(metrics, steps_per_epoch, remedies)
