"""Multi-scale lookup-free quantizer of XQ-GAN (Li et al. 2024, arXiv:2412.01762): VAR's residual scales (Tian et al.
2024, arXiv:2404.02905), where a code is the signs of what a scale has to describe, as in MAGVIT-v2 (Yu et al. 2023,
arXiv:2310.05737), or with `unit_length` in binary spherical quantization (Zhao et al. 2024, arXiv:2406.07548).

There is no codebook to learn: the vectors of a scale are the corners of a cube, which may be smaller from scale to
scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.distributed import mean_over_processes
from common.errors import check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.bits import batch_entropy, bit_entropy, bits_to_codes, codes_to_bits
from stage1_vq.quantizers.float32 import ProductConv2d
from stage1_vq.quantizers.gradients import StraightThrough
from stage1_vq.quantizers.lfq import check_bits_config
from stage1_vq.quantizers.scales import (
    ScaleQuantizer,
    fitting_phis,
    phi_convolutions,
    phi_of_each_scale,
    scale_rules,
)
from stage1_vq.quantizers.usage import CodeUsage
from stage1_vq.squared_error import squared_error

MOST_BITS_OF_A_PRIOR = 16  # beyond them no next-scale prior has an output for each code


@dataclass(frozen=True, kw_only=True)
class MultiscaleBitsConfig:
    """XQ-GAN's recipes have 12 bits, unit_length, inverse_temperature=1, entropy_bits=1, ratio=1 and
    quantizer_dropout=0.1."""

    kind: Literal["multiscale_bits"] = "multiscale_bits"
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # sides of the grids, coarse to fine: the last is h = w
    bits: int = 12  # numbers of the narrow latent: the vocabulary is 2^bits
    dim: int = 12  # width of z and z_q; other than bits: with a 1x1 convolution before and one after
    unit_length: bool = False  # narrow latents get length 1, and so have the corners of the first scale
    ratio: float = 1.0  # of the corners of a scale to those of the one before it
    commitment_weight: float = 0.25  # pulls the latents to the sum of the scales
    entropy_weight: float = 0.1  # of both entropy terms: each latent sure of its code, all codes in use
    diversity: float = 1.0  # weight of the second entropy term relative to the first
    inverse_temperature: float = 100.0  # of the soft assignment that the entropies are those of
    entropy_bits: int = 12  # bits whose joint use the second term sees; fewer: in groups, coarser and cheaper
    phis: int = 4  # 3x3 convolutions after up-sampling, each shared by neighbouring scales
    phi_share: float = 0.5  # of the convolution in what phi adds; the rest is the up-sampled map itself
    quantizer_dropout: float = 0.0  # share of training images whose z_q ends after a random number of scales
    fewest_scales: int = 1  # that quantizer_dropout leaves
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        check_bits_config(self)
        check_fields(
            self,
            [
                *scale_rules(self, fitting_phis(len(self.scales))),
                ("ratio", 0 < self.ratio <= 1, "above 0 and at most 1, where all scales have the same corners"),
            ],
        )


class MultiscaleBitsQuantizer(ScaleQuantizer):
    """z -> [1x1 convolution to bits] -> [length 1] -> f; scales as in `ScaleQuantizer`, where the code of a rest is its
    signs and its vector a corner; their sum -> [1x1 convolution to dim] -> z_q.

    Codes: the bits as a number, first one most significant, 1 where the number is above 0. The gradient passes straight
    to f. All of it in float32.
    """

    config_class = MultiscaleBitsConfig
    config: MultiscaleBitsConfig
    codes_are_bits = True
    remedies = ("a higher {path}.entropy_weight", "fewer {path}.bits")

    def __init__(self, config: MultiscaleBitsConfig) -> None:
        super().__init__(config, config.dim, config.bits, phi_of_each_scale(len(config.scales), config.phis))
        projected = config.dim != config.bits
        self.project_in = ProductConv2d(config.dim, config.bits) if projected else nn.Identity()
        self.project_out = ProductConv2d(config.bits, config.dim) if projected else nn.Identity()
        self.phis = phi_convolutions(config.bits, config.phis)
        self.usage = CodeUsage(2**config.bits, config.warn_usage_below)

    @property
    def vocabulary(self) -> int:
        return 2**self.config.bits

    def corner(self, number: int) -> float:
        """The numbers of a corner of scale `number` are this and minus this."""
        first = self.config.bits**-0.5 if self.config.unit_length else 1.0
        return first * self.config.ratio**number

    def nearest(self, rest: Tensor, number: int) -> Tensor:
        return bits_to_codes(rest > 0)

    def vectors(self, codes: Tensor, number: int) -> Tensor:
        return (2 * codes_to_bits(codes, self.config.bits).float() - 1) * self.corner(number)

    def narrow(self, z: Tensor) -> Tensor:
        vectors = self.project_in(z)
        return F.normalize(vectors, dim=1) if self.config.unit_length else vectors

    def widened(self, total: Tensor) -> Tensor:
        return self.project_out(total)

    def forward(self, z: Tensor, kept: Tensor | None = None) -> Quantized:
        """z: b d h w; kept: as `draw_kept` draws it, None: drawn here. Losses, means over the scales, each times its
        weight: `commitment_loss` and `codebook_loss` (which teaches phi alone), squared errors per number of the sum
        after each scale; in training mode `entropy_loss`, the entropy of the soft assignment of what is left before a
        scale, mean over places, and `diversity_loss`, minus the entropy of its mean, both in nats. Statistics:
        `quantization_error`, that of the last sum, and the entropies without weights, `sample_entropy` and
        `batch_entropy`."""
        self.check_latents(z)
        config = self.config
        kept = self.draw_kept(len(z), z.device) if kept is None else kept
        with float32_island(z.device.type):
            latents = self.narrow(z.float())
            target, total = latents.detach(), torch.zeros_like(latents)
            found: list[Tensor] = []
            sums: list[Tensor] = []
            errors: list[Tensor] = []
            commitments: list[Tensor] = []
            entropies: list[tuple[Tensor, Tensor]] = []
            for number, size in enumerate(self.sizes(*z.shape[2:])):
                before = total.detach()
                found.append(self.nearest(self.shrink(target - before, number, size), number))
                if self.training and config.entropy_weight:
                    entropies.append(self.entropies(latents - before, number))
                total = total + self.grow(found[-1], number, target.shape[2:])
                sums.append(total.detach())
                errors.append(squared_error(total, target))
                if config.commitment_weight:
                    commitments.append(squared_error(latents, total.detach()))
            if self.training:
                for codes in found:
                    self.usage.note(codes)
            losses = {"codebook_loss": torch.stack(errors).mean()}
            statistics = {"quantization_error": errors[-1].detach()}
            if commitments:
                losses["commitment_loss"] = config.commitment_weight * torch.stack(commitments).mean()
            if entropies:
                sample, batch = (torch.stack(each).mean() for each in zip(*entropies, strict=True))
                losses["entropy_loss"] = config.entropy_weight * sample
                statistics |= {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
                if config.diversity:
                    losses["diversity_loss"] = -config.entropy_weight * config.diversity * batch
            z_q = self.widened(StraightThrough.apply(latents, self.seen_by_decoder(sums, kept))).to(z.dtype)
            return Quantized(z_q, tuple(found), losses, statistics)

    def entropies(self, rest: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """In nats, of the soft assignment of rest, b bits h w, to the corners of scale `number`: the mean over places,
        and that of the mean. As XQ-GAN takes it, at every place of the finest grid."""
        logits = 4 * self.config.inverse_temperature * self.corner(number) * rest
        rows = rearrange(logits, "b bits h w -> (b h w) bits")
        return bit_entropy(rows).sum(1).mean(), batch_entropy(rows, self.config.entropy_bits)

    @torch.no_grad()
    def scale_parts(self) -> dict[str, Tensor] | None:
        """The corners of a cube of side 2 as code vectors, whose gains are the corners of each scale; None where they
        are too many for a prior that has an output for each."""
        config = self.config
        if config.bits > MOST_BITS_OF_A_PRIOR:
            return None
        folded = self.folded_phis()
        every = torch.arange(self.vocabulary, device=folded["phi_bias"].device).view(1, 1, -1)
        gains = [self.corner(number) for number in range(len(config.scales))]
        return {
            "codebook": 2 * codes_to_bits(every, config.bits)[0, :, 0].T.float() - 1,
            "gains": folded["phi_bias"].new_tensor(gains).unsqueeze(1).repeat(1, config.bits),
            **folded,
        }

    # ---- once per step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """Starts each bit on both sides of its border, as LFQ does: the bias of the convolution before the signs, where
        there is one, takes away the mean."""
        if isinstance(self.project_in, nn.Conv2d):
            with float32_island(batches[0].device.type):
                means = torch.stack([self.project_in(z.float()).mean((0, 2, 3)) for z in batches]).mean(0)
            self.project_in.get_parameter("bias").sub_(mean_over_processes(means))

    def update(self) -> None:
        self.usage.step()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        """`CodeUsage.health`, of the codes of all scales."""
        return self.usage.health(steps_per_epoch)

    def discard(self) -> None:
        self.usage.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        remedies = [remedy.format(path=self.path) for remedy in self.remedies]
        return self.usage.warnings(metrics, steps_per_epoch, remedies)
