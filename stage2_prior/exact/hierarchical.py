"""The exact walk of `Hierarchical`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codes.spec import Codes
from stage2_prior.condition import Condition
from stage2_prior.exact.pixelcnn import ExactPixelCNN
from stage2_prior.exact.pixelsnail import ExactPixelSNAIL
from stage2_prior.exact.transformer import ExactTransformer
from stage2_prior.priors.hierarchical import Hierarchical, below
from stage2_prior.stepping import Stepper

LEVEL_WALKS: dict[str, Callable[[Any, int, Condition], Stepper]] = {
    "pixelsnail": ExactPixelSNAIL,
    "pixelcnn": ExactPixelCNN,
    "transformer": ExactTransformer,
}


class ExactHierarchical:
    """The exact walks of the levels, one after the other: each is made when the levels above it are known, and dropped
    with its caches when its own codes are."""

    def __init__(self, prior: Hierarchical, batch: int, condition: Condition):
        prior.check(batch, condition)
        self.prior, self.batch = prior, batch
        self.condition = condition.to(next(prior.parameters()).device)
        self.known: Codes = self.condition.codes or ()  # of the levels above, and of what the prior itself is given
        self.level = 0
        self.chosen: list[Tensor] = []  # codes of this level, each b m
        self.walk = self.begin()

    def begin(self) -> Stepper:
        prior = self.prior.level(self.level)
        return LEVEL_WALKS[prior.kind](prior, self.batch, below(self.condition, self.known))

    def next(self, previous: Tensor | None) -> Tensor:
        if previous is not None:
            self.chosen.append(previous)
            if sum(codes.shape[1] for codes in self.chosen) == self.prior.code_spec.grids[self.level].size:
                self.known += self.prior.level(self.level).grids_of(torch.cat(self.chosen, dim=1))
                self.level, self.chosen, previous = self.level + 1, [], None
                self.walk = self.begin()
        return self.walk.next(previous)
