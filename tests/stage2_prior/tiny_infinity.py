"""Small priors of Infinity's kind, over codes of 7 bits on four scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codes.spec import Codes, CodeSpec
from stage1_vq.quantizers import (
    MultiscaleBSQConfig,
    MultiscaleBSQuantizer,
)
from stage2_prior.condition import Condition, EmbeddingSpec
from stage2_prior.priors import Infinity, InfinityConfig
from stage2_prior.stepping import Stepper, walk
from tests.stage2_prior.tiny import CLASSES, tiny_prior

CONFIG = InfinityConfig(layers=3, width=32, heads=2)
SCALES = (1, 2, 4, 6)  # of maps 6x9


def quantizer(dim: int = 7, bits_per_code: int = 3) -> MultiscaleBSQuantizer:
    return MultiscaleBSQuantizer(MultiscaleBSQConfig(scales=SCALES, dim=dim, bits_per_code=bits_per_code)).eval()


def spec_of(dim: int = 7, bits_per_code: int = 3) -> CodeSpec:
    """Codes of 7 bits: three grids of each scale, the last of which has one bit."""
    return CodeSpec(quantizer(dim, bits_per_code).grids(6, 9), 24, 36)


def made(
    num_classes: int = CLASSES, config: InfinityConfig = CONFIG, spec: CodeSpec | None = None, **facts: Any
) -> Infinity:
    prior = tiny_prior("infinity", num_classes, spec or spec_of(), config=config, **facts)
    assert isinstance(prior, Infinity)
    return prior


def captions(prior: Infinity, counts: Sequence[int]) -> Condition:
    """Sentences of so many words, and what stands behind them."""
    assert prior.embeddings is not None
    shape = (len(counts), prior.embeddings.length, prior.embeddings.width)
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
    return Condition(embeddings=vectors, embedding_mask=mask)


def of_captions(length: int = 5, width: int = 12, **facts: Any) -> Infinity:
    return made(0, embeddings=EmbeddingSpec(length, width), **facts)


def led_along(stepper: Stepper, codes: Codes) -> Tensor:
    """Logits of all codes, `b n k`."""
    sequence = torch.cat([grid.flatten(1) for grid in codes], dim=1)
    steps: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        steps.append(logits)
        return sequence[:, position : position + logits.shape[1]]

    walk(stepper, sequence.shape[1], choose)
    return torch.cat(steps, dim=1)
