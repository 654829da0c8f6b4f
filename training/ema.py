"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from common.compatibility import follow_all
from common.distributed import own_part
from common.model_io import PretrainedModel


@runtime_checkable
class AmendsAverage(Protocol):
    """A module some of whose weights jump: between what they were and what they are an average means nothing."""

    def amend_average(self, average: Any) -> None:
        """Gives its counterpart in the averaged model what no average should be taken of. Called after each step, when
        the average has followed the weights."""
        ...


class EMA:
    """A copy of `source` whose weights follow it: ema <- decay * ema + (1 - decay) * weights after each step.

    The decay starts low, min(decay, (1 + step) / (10 + step)) as in TensorFlow's ExponentialMovingAverage, so
    that the random first weights are forgotten soon. Buffers of the state dict (codebooks, which are averages
    already) are copied; buffers outside it (statistics that wait for the end of the step) do not matter to a
    model at rest.
    """

    def __init__(self, source: PretrainedModel, decay: float):
        self.decay = decay
        self.source = source
        self.model: PretrainedModel = copy.deepcopy(source).requires_grad_(False).eval()
        self.find_weights()
        copies = self.model.state_dict(keep_vars=True)
        self._buffers = [
            (copies[name], buffer)
            for name, buffer in source.state_dict(keep_vars=True).items()
            if not isinstance(buffer, nn.Parameter)
        ]
        pairs = zip(source.modules(), self.model.modules(), strict=True)
        self._amending = [(module, average) for module, average in pairs if isinstance(module, AmendsAverage)]

    def find_weights(self) -> None:
        """Called again when both models have shares in the place of weights (training/sharding.py)."""
        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(self.source.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the source after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([own_part(tensor) for tensor in tensors] for tensors in (self._averages, self._weights))
        follow_all(averages, weights, 1 - decay)
        for average, buffer in self._buffers:
            average.copy_(buffer)
        for module, average_module in self._amending:
            module.amend_average(average_module)

    def reset(self) -> None:
        """Takes over the source's weights as they are."""
        self.model.load_state_dict(self.source.state_dict())
