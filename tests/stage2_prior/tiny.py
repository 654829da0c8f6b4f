"""Priors small enough to test in a second, one of each kind, with no weight that is zero or one by accident."""

from __future__ import annotations

from typing import Any

import torch

from stage1_vq.codes import Codes, CodeSpec, Grid
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, PixelCNNConfig, Prior, PriorConfig, TransformerConfig

TINY: dict[str, PriorConfig] = {
    "transformer": TransformerConfig(layers=2, width=32, heads=4),
    "pixelcnn": PixelCNNConfig(layers=4, width=16, first_kernel_size=5, kernel_size=3, output_width=24),
}

VOCABULARY, HEIGHT, WIDTH, CLASSES = 11, 3, 5, 4  # no two alike, so that no axis passes for another

# Codes of the priors that do not model one plain grid.
SPECS: dict[str, CodeSpec] = {}


def tiny_spec(height: int = HEIGHT, width: int = WIDTH, vocabulary: int = VOCABULARY) -> CodeSpec:
    return CodeSpec((Grid("codes", height, width, vocabulary),), 4 * height, 4 * width, 3)


def spec_of(kind: str) -> CodeSpec:
    return SPECS.get(kind, tiny_spec())


def tiny_prior(
    kind: str, num_classes: int = CLASSES, spec: CodeSpec | None = None, noise: float = 0.2, **facts: Any
) -> Prior:
    """Untrained, in eval mode. noise: standard deviation of what is added to every fresh weight."""
    torch.manual_seed(0)
    prior = PRIORS[kind](TINY[kind], spec or spec_of(kind), num_classes, **facts)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return prior.eval()


def random_codes(batch: int, prior: Prior, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(grid.vocabulary, (batch, grid.height, grid.width), generator=generator)
        for grid in prior.code_spec.grids
    )


def condition_for(batch: int, prior: Prior) -> Condition:
    """Every label in turn, the null label too; none for a prior without classes."""
    return Condition(torch.arange(batch) % (prior.num_classes + 1) if prior.num_classes else None)


def labelled(batch: int, prior: Prior) -> Condition:
    """Every class in turn, never the null label."""
    return Condition(torch.arange(batch) % prior.num_classes if prior.num_classes else None)
