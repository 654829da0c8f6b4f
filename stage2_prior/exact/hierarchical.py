"""The exact walk of `Hierarchical`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stage2_prior.condition import Condition
from stage2_prior.exact.pixelcnn import ExactPixelCNN
from stage2_prior.exact.pixelsnail import ExactPixelSNAIL
from stage2_prior.exact.transformer import ExactTransformer
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.hierarchical import Hierarchical, HierarchicalStepper
from stage2_prior.stepping import Stepper

LEVEL_WALKS: dict[str, Callable[[Any, int, Condition], Stepper]] = {
    "pixelsnail": ExactPixelSNAIL,
    "pixelcnn": ExactPixelCNN,
    "transformer": ExactTransformer,
}


def exact_hierarchical(prior: Hierarchical, batch: int, condition: Condition) -> Stepper:
    """The exact walks of the levels, one after the other."""
    return HierarchicalStepper(prior, batch, condition, exact_level)


def exact_level(prior: AutoregressivePrior, batch: int, condition: Condition) -> Stepper:
    return LEVEL_WALKS[prior.kind](prior, batch, condition)
