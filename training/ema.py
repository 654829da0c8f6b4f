"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from common.compatibility import follow_all
from common.model_io import PretrainedModel


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
        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(source.parameters())
        parameters = dict(source.named_parameters(remove_duplicate=False))
        self._buffers = [name for name in source.state_dict() if name not in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the source after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        follow_all(self._averages, self._weights, 1 - decay)
        for name in self._buffers:
            self.model.get_buffer(name).copy_(self.source.get_buffer(name))

    def reset(self) -> None:
        """Takes over the source's weights as they are."""
        self.model.load_state_dict(self.source.state_dict())
