"""Bernoulli likelihood of binary images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vae.likelihoods.base import Likelihood, at_least_float


@dataclass(frozen=True, kw_only=True)
class BernoulliConfig:
    """Each number of an image is black or white, with a probability of its own. How grey images become so is said by
    data.binarised."""

    kind: Literal["bernoulli"] = "bernoulli"


class Bernoulli(Likelihood):
    """The network puts out logits. Of grey values between black and white, x in [0, 1], `log_prob` is
    x log p + (1 - x) log(1 - p), which is no likelihood, but what many train on."""

    discrete = True

    def __init__(self, config: BernoulliConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.outputs = channels

    def log_prob(self, outputs: Tensor, images: Tensor) -> Tensor:
        logits, targets = torch.broadcast_tensors(at_least_float(outputs), (images + 1) / 2)
        return -F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=(-3, -2, -1))

    def mean(self, outputs: Tensor) -> Tensor:
        return at_least_float(outputs).sigmoid() * 2 - 1

    def mode(self, outputs: Tensor) -> Tensor:
        return torch.where(outputs > 0, 1.0, -1.0)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(at_least_float(outputs).sigmoid(), generator=generator) * 2 - 1
