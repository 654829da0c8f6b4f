"""Priors evaluated so that their logits are the same on every machine: what a coder stands on. See common/exact.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stage2_prior.condition import Condition
from stage2_prior.exact.hierarchical import ExactHierarchical
from stage2_prior.exact.llamagen import ExactLlamaGen
from stage2_prior.exact.mingpt import ExactMinGPT
from stage2_prior.exact.pixelcnn import ExactPixelCNN
from stage2_prior.exact.pixelsnail import ExactPixelSNAIL
from stage2_prior.exact.rq_transformer import ExactRQTransformer
from stage2_prior.exact.transformer import ExactTransformer
from stage2_prior.exact.var import ExactVAR
from stage2_prior.priors import AutoregressivePrior
from stage2_prior.stepping import Stepper

WALKS: dict[str, Callable[[Any, int, Condition], Stepper]] = {
    "transformer": ExactTransformer,
    "pixelcnn": ExactPixelCNN,
    "pixelsnail": ExactPixelSNAIL,
    "hierarchical": ExactHierarchical,
    "rq_transformer": ExactRQTransformer,
    "llamagen": ExactLlamaGen,
    "mingpt": ExactMinGPT,
    "var": ExactVAR,
}


def exact_stepper(prior: AutoregressivePrior, batch: int, condition: Condition) -> Stepper:
    """As `prior.stepper`, but of float64 logits that are the same bit for bit on every device, with any number of
    threads, in a batch of any size. Without dropout. Autocast changes nothing."""
    return WithoutAutocast(prior, batch, condition)


class WithoutAutocast:
    """The exact walk, whose products of factors must be of the type that they are."""

    def __init__(self, prior: AutoregressivePrior, batch: int, condition: Condition):
        self.kind = next(prior.parameters()).device.type
        with torch.autocast(self.kind, enabled=False):
            self.stepper = WALKS[prior.kind](prior, batch, condition)

    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.kind, enabled=False):
            return self.stepper.next(previous)
