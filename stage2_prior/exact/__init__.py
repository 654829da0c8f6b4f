"""Priors evaluated so that their logits are the same on every machine: what a coder stands on. See common/exact.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stage2_prior.condition import Condition
from stage2_prior.exact.hierarchical import exact_hierarchical
from stage2_prior.exact.ibq_gpt import ExactIBQGPT
from stage2_prior.exact.infinity import ExactInfinity
from stage2_prior.exact.llamagen import ExactLlamaGen
from stage2_prior.exact.mingpt import ExactMinGPT
from stage2_prior.exact.open_magvit2_gpt import ExactOpenMAGVIT2GPT
from stage2_prior.exact.pixelcnn import ExactPixelCNN
from stage2_prior.exact.pixelsnail import ExactPixelSNAIL
from stage2_prior.exact.randar import ExactRandAR
from stage2_prior.exact.rar import ExactRAR
from stage2_prior.exact.rq_transformer import ExactRQTransformer
from stage2_prior.exact.transformer import ExactTransformer
from stage2_prior.exact.var import ExactVAR
from stage2_prior.priors import AutoregressivePrior, Hierarchical, Prior, RandAR
from stage2_prior.stepping import Stepper

WALKS: dict[str, Callable[[Any, int, Condition], Stepper]] = {
    "transformer": ExactTransformer,
    "pixelcnn": ExactPixelCNN,
    "pixelsnail": ExactPixelSNAIL,
    "hierarchical": exact_hierarchical,
    "rq_transformer": ExactRQTransformer,
    "llamagen": ExactLlamaGen,
    "rar": ExactRAR,
    "randar": ExactRandAR,
    "ibq_gpt": ExactIBQGPT,
    "open_magvit2_gpt": ExactOpenMAGVIT2GPT,
    "mingpt": ExactMinGPT,
    "var": ExactVAR,
    "infinity": ExactInfinity,
}


def exact_stepper(prior: AutoregressivePrior, batch: int, condition: Condition) -> Stepper:
    """As `prior.stepper`, but of float64 logits that are the same bit for bit on every device, with any number of
    threads, in a batch of any size. Without dropout. Autocast changes nothing."""
    return WithoutAutocast(prior, batch, condition)


def cache_bytes(prior: Prior) -> int:
    """About what the walk of one image keeps of its places, keys and values or rows of features: an upper bound."""
    if isinstance(prior, Hierarchical):  # one level after the other
        return max(cache_bytes(prior.level(number)) for number in range(len(prior.levels)))
    layers = prior.config.layers if hasattr(prior.config, "layers") else prior.config.blocks
    read = [spec.length for spec in (prior.text, prior.embeddings) if spec is not None]
    places = 1 + prior.code_spec.codes_per_image + sum(grid.size for grid in prior.given) + sum(read)
    if isinstance(prior, RandAR):  # an instruction before each code
        places = 2 * prior.code_spec.codes_per_image
    return int(16 * places * layers * prior.config.width)


class WithoutAutocast:
    """The exact walk, whose products of factors must be of the type that they are."""

    def __init__(self, prior: AutoregressivePrior, batch: int, condition: Condition):
        self.kind = next(prior.parameters()).device.type
        with torch.autocast(self.kind, enabled=False):
            self.stepper = WALKS[prior.kind](prior, batch, condition)

    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.kind, enabled=False):
            return self.stepper.next(previous)
