"""Priors small enough to test in a second, one of each kind, with no weight that is zero or one by accident."""

from __future__ import annotations

from typing import Any

import torch

from codes.spec import Codes, CodeSpec, Grid
from stage2_prior.condition import Condition
from stage2_prior.priors import (
    PRIORS,
    DiffusionConfig,
    HaltonMaskGITConfig,
    HierarchicalConfig,
    IBQGPTConfig,
    InfinityConfig,
    LlamaGenConfig,
    MaskGITConfig,
    MDMPrimeConfig,
    MinGPTConfig,
    OpenMAGVIT2GPTConfig,
    PixelCNNConfig,
    PixelSNAILConfig,
    Prior,
    PriorConfig,
    RandARConfig,
    RARConfig,
    RQTransformerConfig,
    TiTokMaskGITConfig,
    TransformerConfig,
    VARConfig,
)

TINY: dict[str, PriorConfig] = {
    "transformer": TransformerConfig(layers=2, width=32, heads=4),
    "pixelcnn": PixelCNNConfig(layers=4, width=16, first_kernel_size=5, kernel_size=3, output_width=24),
    "pixelsnail": PixelSNAILConfig(
        blocks=2, residual_blocks=2, width=16, residual_width=12, heads=4, output_blocks=1, dropout=0.0
    ),
    "mingpt": MinGPTConfig(layers=2, width=24, heads=3),
    "llamagen": LlamaGenConfig(layers=2, width=24, heads=3, hidden_width=32),
    "rar": RARConfig(layers=2, width=24, heads=3, dropout=0.0, attention_dropout=0.0),
    "randar": RandARConfig(layers=2, width=32, heads=4, hidden_width=48),
    "ibq_gpt": IBQGPTConfig(layers=2, width=32, heads=4, hidden_width=48),
    "open_magvit2_gpt": OpenMAGVIT2GPTConfig(layers=2, factor_layers=2, width=32, heads=4, hidden_width=48),
    "rq_transformer": RQTransformerConfig(layers=2, depth_layers=1, width=32, heads=4),
    "var": VARConfig(layers=2, width=32, heads=2),
    "infinity": InfinityConfig(layers=2, width=32, heads=2),
    "hierarchical": HierarchicalConfig(
        top=PixelCNNConfig(layers=3, width=16, first_kernel_size=3, kernel_size=3, output_width=24),
        middle=TransformerConfig(layers=1, width=16, heads=2),
        bottom=TransformerConfig(layers=1, width=24, heads=2),
    ),
    # Without smoothing, so that what is learned by heart has probability 1.
    "maskgit": MaskGITConfig(layers=2, width=32, heads=4, label_smoothing=0.0, nll_levels=15),
    "diffusion": DiffusionConfig(layers=2, width=32, heads=4, nll_levels=15),
    "mdm_prime": MDMPrimeConfig(layers=2, width=32, heads=4, nll_levels=15),
    # Heads that do not fill the width, as of the published small model.
    "halton_maskgit": HaltonMaskGITConfig(layers=2, width=32, heads=3, hidden_width=48, registers=2, nll_levels=15),
    "titok_maskgit": TiTokMaskGITConfig(
        layers=2, width=32, heads=4, hidden_width=64, dropout=0.0, label_smoothing=0.0, nll_levels=15
    ),
}

VOCABULARY, HEIGHT, WIDTH, CLASSES = 11, 3, 5, 4  # no two alike, so that no axis passes for another

# Codes of the priors that do not model one plain grid.
SPECS: dict[str, CodeSpec] = {
    # As narrow as its kernel reaches: the last code of a row is seen from the next row by convolutions only.
    "pixelsnail": CodeSpec((Grid("codes", 5, 3, 11),), 20, 12, 3),
    "diffusion": CodeSpec((Grid("top", 1, 2, 7), Grid("bottom", 2, 3, 11)), 8, 12, 3),
    "mdm_prime": CodeSpec((Grid("top", 1, 2, 7), Grid("bottom", 2, 2, 11)), 8, 8, 3),
    "maskgit": CodeSpec((Grid("top", 1, 2, 11), Grid("bottom", 2, 3, 7)), 8, 12, 3),
    "titok_maskgit": CodeSpec((Grid("tokens", 1, 6, 11),), 16, 16, 3),
    "halton_maskgit": CodeSpec((Grid("codes", 2, 4, 11),), 8, 16, 3),
    "hierarchical": CodeSpec((Grid("level0", 2, 2, 7), Grid("level1", 2, 4, 11), Grid("level2", 4, 4, 9)), 16, 16, 3),
    "open_magvit2_gpt": CodeSpec(tuple(Grid(f"factor{i}", 2, 3, k) for i, k in enumerate((4, 16, 8))), 8, 12, 3),
    "rq_transformer": CodeSpec(tuple(Grid(f"depth{i}", 2, 3, k) for i, k in enumerate((11, 7, 9))), 8, 12, 3),
    "var": CodeSpec(tuple(Grid(f"scale{i}", i, 2 * i - 1, 11) for i in (1, 2, 3)), 12, 20, 3),
    "infinity": CodeSpec(
        tuple(Grid(f"scale{i}_bits{group}", i, 2 * i - 1, 4) for i in (1, 2, 3) for group in (0, 1)), 12, 20, 3
    ),
}


def tiny_spec(height: int = HEIGHT, width: int = WIDTH, vocabulary: int = VOCABULARY) -> CodeSpec:
    return CodeSpec((Grid("codes", height, width, vocabulary),), 4 * height, 4 * width, 3)


def spec_of(kind: str) -> CodeSpec:
    return SPECS.get(kind, tiny_spec())


def tiny_prior(
    kind: str,
    num_classes: int = CLASSES,
    spec: CodeSpec | None = None,
    noise: float = 0.2,
    config: PriorConfig | None = None,
    **facts: Any,
) -> Prior:
    """Untrained, in eval mode. noise: standard deviation of what is added to every fresh weight. config: None for that
    of `TINY`."""
    torch.manual_seed(0)
    prior = PRIORS[kind](config or TINY[kind], spec or spec_of(kind), num_classes, **facts)
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
