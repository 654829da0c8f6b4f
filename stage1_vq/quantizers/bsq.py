"""Binary spherical quantization (Zhao et al. 2024, arXiv:2406.07548): lookup-free quantization on the unit sphere. The
narrow latent gets length 1, and so have the corners: the error of the quantization is bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from stage1_vq.quantizers.lfq import LFQuantizer, check_bits_config


@dataclass(frozen=True, kw_only=True)
class BSQConfig:
    """As the config of LFQ. The authors' recipes have no commitment loss; groups of 9 bits are the default of their
    code, where some of those recipes have groups of 1."""

    kind: Literal["bsq"] = "bsq"
    bits: int = 18  # numbers of the narrow latent: the vocabulary is 2^bits
    dim: int = 18  # width of z and z_q; other than bits: with a 1x1 convolution before and one after
    commitment_weight: float = 0.0  # pulls the encoder's output to its corner
    entropy_weight: float = 0.1  # of both entropy terms: each latent sure of its code, all codes in use
    diversity: float = 1.0  # gamma: weight of the second entropy term relative to the first
    inverse_temperature: float = 10.0  # of the soft assignment that the entropies are those of
    entropy_bits: int = 9  # bits whose joint use the second term sees; the rest of them in further groups
    warn_usage_below: float = 0.5  # share of codes used in an epoch below which the log warns

    def __post_init__(self) -> None:
        check_bits_config(self)

    @property
    def corner(self) -> float:
        """The numbers of a corner are this and minus this."""
        return self.bits**-0.5

    @property
    def soft_clamp(self) -> None:
        """None: length 1 bounds the latents."""

    @property
    def orthogonal_rotation(self) -> Literal[False]:
        return False

    @property
    def factorized_bits(self) -> None:
        """None: a code is one."""


class BSQuantizer(LFQuantizer):
    """z -> [1x1 convolution to bits] -> length 1 -> nearest corner -> [1x1 convolution to dim] -> z_q.

    The straight-through gradient is the identity on the sphere; the step to it has its own.
    """

    config_class = BSQConfig

    def lookup_vectors(self, z: Tensor) -> Tensor:
        return F.normalize(super().lookup_vectors(z), dim=1)
