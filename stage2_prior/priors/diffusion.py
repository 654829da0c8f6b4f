"""Discrete diffusion with an absorbing state (D3PM, Austin et al. 2021, arXiv:2107.03006; over the codes of an image:
Bond-Taylor et al. 2021, arXiv:2111.12701).

As time t runs from 0 to 1, each code is hidden with probability t. The prior learns the way back. Its loss is the bound
on the likelihood: the nll of hidden codes weighed by 1/t (Sahoo et al. 2024, arXiv:2406.07524), which is the mean over
all orders of revealing them one by one (Hoogeboom et al. 2022, arXiv:2110.02037).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from codes.spec import Codes
from common.draws import spread
from stage2_prior.condition import Condition
from stage2_prior.priors.base import TrainingLoss
from stage2_prior.priors.masked import MaskedTransformer, hide, network_of
from stage2_prior.priors.transformer_layers import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    kind: Literal["diffusion"] = "diffusion"
    layers: int = 8
    width: int = 256  # d
    heads: int = 8  # each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    dropout: float = 0.0  # of the embedded sequence
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream
    nll_levels: int = 8  # passes by which a validation estimates the nll of an image; more: less noise

    def __post_init__(self) -> None:
        _ = self.network  # refuses impossible sizes

    @property
    def network(self) -> TransformerConfig:
        return network_of(self)


class Diffusion(MaskedTransformer):
    kind = "diffusion"
    config_class = DiffusionConfig
    config: DiffusionConfig
    sampling_steps = 64
    mask_schedule = "linear"
    fill_order = "random"

    def forward(self, codes: Codes, condition: Condition) -> TrainingLoss:
        """The bound on the nll per code, estimated at one time for each sample, the times of a batch evenly apart.

        Independent of each other, codes are hidden in numbers from 0 to n, each as often if t is uniform, and the mean
        of 1/t where i are hidden is (n + 1)/i. So we draw i from 1 to n instead and take the mean nll of the i: the
        same expectation, without the variance of t, which is infinite for 1/t."""
        sequence = self.sequence(codes, condition)
        positions = sequence.shape[1]
        counts = (positions * spread(len(sequence), sequence.device)).floor().add(1).clamp(max=positions)
        losses = self.hidden_nll(sequence, hide(counts, positions), condition)
        loss = losses.sum(dim=1) / counts
        return TrainingLoss(loss, loss.detach())
