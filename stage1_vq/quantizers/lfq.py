"""Lookup-free quantization of MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737): the sign of each number of a narrow latent
is a bit of its code, and the codebook is the corners of a cube.

Entropy terms keep latents away from the borders and codes in use (section 3.1 there). They rest on a soft assignment of
a latent to all 2^bits codes: softmax of minus squared distance times the inverse temperature. With corners for codes
its bits are independent of each other, each with the logit 4 * inverse_temperature * corner * number; hence no table of
all latents by all codes is needed for either term (stage1_vq/quantizers/bits.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.distributed import mean_over_processes
from common.errors import FieldError, check_fields
from common.float32 import float32_island
from stage1_vq.quantizers.base import Quantized
from stage1_vq.quantizers.bits import batch_entropy, bit_entropy, bits_to_codes, codes_to_bits
from stage1_vq.quantizers.counting import CountingQuantizer
from stage1_vq.quantizers.float32 import ProductConv2d, turned
from stage1_vq.quantizers.gradients import StraightThrough

MOST_BITS = 24


@dataclass(frozen=True, kw_only=True)
class LFQConfig:
    """The paper's vocabulary is the default one, 2^18."""

    kind: Literal["lfq"] = "lfq"
    bits: int = 18  # numbers of the narrow latent: the vocabulary is 2^bits
    dim: int = 18  # width of z and z_q; other than bits: with a 1x1 convolution before and one after
    commitment_weight: float = 0.25  # pulls the encoder's output to its corner
    entropy_weight: float = 0.1  # of both entropy terms: each latent sure of its code, all codes in use
    diversity: float = 1.0  # gamma: weight of the second entropy term relative to the first
    inverse_temperature: float = 100.0  # of the soft assignment that the entropies are those of
    entropy_bits: int = 18  # bits whose joint use the second term sees; fewer: in groups, coarser and cheaper
    corner: float = 1.0  # the numbers of a corner are this and minus this
    soft_clamp: float | None = None  # z becomes soft_clamp * tanh(z / soft_clamp): none runs far from its corner
    orthogonal_rotation: bool = False  # numbers are turned by a fixed random rotation before, and back after
    factorized_bits: tuple[int, ...] | None = None  # a code in several grids, of so many bits, the last bits first
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        check_bits_config(self)
        parts = self.factorized_bits
        if parts is not None and (sum(parts) != self.bits or min(parts, default=0) < 1):
            raise FieldError(self, "factorized_bits", f"numbers of at least 1 that are bits={self.bits} together")
        if self.corner <= 0:
            raise FieldError(self, "corner", "above 0; the paper has 1")
        if self.soft_clamp is not None and self.soft_clamp < self.corner:
            raise FieldError(
                self,
                "soft_clamp",
                f"at least corner={self.corner}, which no latent could reach otherwise, or null for none",
            )


def check_bits_config(config: Any) -> None:
    """Raises UserError for a config of LFQ or BSQ that cannot be."""
    rules = [
        ("bits", 1 <= config.bits <= MOST_BITS, f"from 1 to {MOST_BITS}"),
        ("dim", config.dim >= 1, "at least 1"),
        ("commitment_weight", config.commitment_weight >= 0, "0 or more"),
        ("entropy_weight", config.entropy_weight >= 0, "0 (no entropy terms) or more"),
        ("diversity", config.diversity >= 0, "0 (first entropy term only) or more"),
        ("inverse_temperature", config.inverse_temperature > 0, "above 0"),
        ("entropy_bits", 1 <= config.entropy_bits <= MOST_BITS, f"from 1 to {MOST_BITS}; 9 is common"),
        ("warn_usage_below", 0 <= config.warn_usage_below <= 1, "a share from 0 to 1"),
    ]
    check_fields(config, rules)


class LFQuantizer(CountingQuantizer):
    """z -> [1x1 convolution to bits] -> [rotation] -> [soft clamp] -> nearest corner -> [rotation back] ->
    [1x1 convolution to dim] -> z_q.

    Codes: the bits as a number, first one most significant, 1 where the number is above 0. With `factorized_bits` they
    are several (Luo et al. 2024, arXiv:2409.04410, section 3.2), each in a grid of its own: the least significant bits
    first. All in float32, also under autocast; z_q has the type of z.
    """

    config_class: ClassVar[type] = LFQConfig
    codes_are_bits = True
    config: Any  # LFQConfig, or BSQ's
    remedies = ("a higher {path}.entropy_weight", "fewer {path}.bits")

    rotation: Tensor  # bits bits, with orthogonal_rotation: row i is where number i goes

    def __init__(self, config: Any) -> None:
        super().__init__(config.dim, 2**config.bits, config.warn_usage_below)
        self.config = config
        projected = config.dim != config.bits
        self.project_in = ProductConv2d(config.dim, config.bits) if projected else nn.Identity()
        self.project_out = ProductConv2d(config.bits, config.dim) if projected else nn.Identity()
        self.corner = config.corner
        if config.orthogonal_rotation:
            self.register_buffer("rotation", nn.init.orthogonal_(torch.empty(config.bits, config.bits)))

    def forward(self, z: Tensor) -> Quantized:
        """z: b d h w. Losses, each times its weight: `commitment_loss`, the squared error per number; in training mode
        `entropy_loss`, the entropy of the soft assignment, mean over latents, and `diversity_loss`, minus the entropy
        of its mean over latents, both in nats. Statistics: `quantization_error`, and the entropies without weights,
        `sample_entropy` and `batch_entropy`."""
        with float32_island(z.device.type):
            vectors = self.lookup_vectors(z)  # b bits h w
            bits = vectors.detach() > 0
            codes, corners = bits_to_codes(bits), self.corners(bits)
            if self.training:
                self.usage.note(codes)
            z_q = self.project_out(self.turned_back(StraightThrough.apply(vectors, corners))).to(z.dtype)

            losses, statistics = {}, {"quantization_error": F.mse_loss(vectors.detach(), corners)}
            if self.config.commitment_weight:
                losses["commitment_loss"] = self.config.commitment_weight * F.mse_loss(vectors, corners)
            if self.training and self.config.entropy_weight:
                logits = 4 * self.config.inverse_temperature * self.corner * vectors
                logits = rearrange(logits, "b bits h w -> (b h w) bits")
                sample_entropy = bit_entropy(logits).sum(1).mean()
                losses["entropy_loss"] = self.config.entropy_weight * sample_entropy
                statistics["sample_entropy"] = sample_entropy.detach()
                if self.config.diversity:
                    batch = batch_entropy(logits, self.config.entropy_bits)
                    losses["diversity_loss"] = -self.config.entropy_weight * self.config.diversity * batch
                    statistics["batch_entropy"] = batch.detach()
            return Quantized(z_q, self.factors(codes), losses, statistics)

    def codes(self, z: Tensor) -> Codes:
        with float32_island(z.device.type):
            return self.factors(bits_to_codes(self.lookup_vectors(z) > 0))

    def codes_to_latents(self, codes: Codes) -> Tensor:
        whole = codes[-1]
        for factor, bits in zip(codes[-2::-1], self.bits_of_factors()[-2::-1], strict=True):
            whole = (whole << bits) + factor
        with float32_island(whole.device.type):
            return self.project_out(self.turned_back(self.corners(codes_to_bits(whole, self.config.bits))))

    def bits_of_factors(self) -> tuple[int, ...]:
        """Of each grid."""
        return self.config.factorized_bits or (self.config.bits,)

    def factors(self, codes: Tensor) -> Codes:
        """Codes, b h w, as their grids."""
        found = []
        for bits in self.bits_of_factors():
            found.append(codes & (2**bits - 1))
            codes = codes >> bits
        return tuple(found)

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """One, or `factor0`, `factor1` and so on."""
        if self.config.factorized_bits is None:
            return super().grids(height, width)
        return tuple(Grid(f"factor{i}", height, width, 2**bits) for i, bits in enumerate(self.config.factorized_bits))

    @torch.no_grad()
    def initialise(self, batches: Sequence[Tensor]) -> None:
        """Starts each bit on both sides of its border: the bias of the convolution before the signs, where there is
        one, takes away the mean. A bit that is the same for all latents would stay so, for far from the border the
        soft assignment has no slope."""
        if isinstance(self.project_in, nn.Conv2d):
            with float32_island(batches[0].device.type):
                means = torch.stack([self.project_in(z.float()).mean((0, 2, 3)) for z in batches]).mean(0)
            self.project_in.get_parameter("bias").sub_(mean_over_processes(means))

    def lookup_vectors(self, z: Tensor) -> Tensor:
        """b bits h w: z where its signs are taken."""
        self.check_latents(z)
        vectors = self.project_in(z.float())
        if self.config.orthogonal_rotation:
            vectors = turned(vectors, self.rotation)
        limit = self.config.soft_clamp
        return vectors if limit is None else limit * (vectors / limit).tanh()

    def turned_back(self, corners: Tensor) -> Tensor:
        return turned(corners, self.rotation.t()) if self.config.orthogonal_rotation else corners

    def corners(self, bits: Tensor) -> Tensor:
        """bits: b bits h w, bool; returns the same shape, float32."""
        return (2 * bits.float() - 1) * self.corner
