"""MaskGIT (Chang et al. 2022, arXiv:2202.04200): learns to fill in hidden codes, more often many than few, and samples
an image in about a dozen steps, in each of which it keeps the codes that it is surest of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from codes.spec import Codes
from common.draws import spread
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors.base import TrainingLoss
from stage2_prior.priors.masked import MaskedTransformer, hide, network_of
from stage2_prior.priors.transformer_layers import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig:
    kind: Literal["maskgit"] = "maskgit"
    layers: int = 8
    width: int = 256  # d
    heads: int = 8  # each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    dropout: float = 0.0  # of the embedded sequence
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream
    label_smoothing: float = 0.1  # share of the target that is spread over all codes of a grid
    nll_levels: int = 8  # passes by which a validation estimates the nll of an image; more: less noise

    def __post_init__(self) -> None:
        _ = self.network  # refuses impossible sizes
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing}, expected a share from 0 to below 1")

    @property
    def network(self) -> TransformerConfig:
        return network_of(self)


class MaskGIT(MaskedTransformer):
    kind = "maskgit"
    config_class = MaskGITConfig
    config: MaskGITConfig
    sampling_steps = 12  # a dozen gave the best images of the paper
    mask_schedule = "cosine"
    fill_order = "confidence"
    choice_temperature = 4.5  # as published

    def forward(self, codes: Codes, condition: Condition) -> TrainingLoss:
        """The cross-entropy of hidden codes, whose share of the image is the cosine of a uniform angle up to a right
        one. Every hidden code counts alike: the sum over those of an image is divided by how many it has on average,
        2/pi n."""
        sequence = self.sequence(codes, condition)
        positions = sequence.shape[1]
        shares = torch.cos(math.pi / 2 * spread(len(sequence), sequence.device))
        hidden = hide((positions * shares).ceil().clamp(1, positions), positions)
        losses = self.hidden_nll(sequence, hidden, condition, self.config.label_smoothing)
        return TrainingLoss(losses.sum(dim=1) / (2 / math.pi * positions), None)
