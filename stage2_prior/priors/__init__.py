"""Priors by kind: a new prior is a new file here and a line in this table."""

from __future__ import annotations

from stage2_prior.priors.base import AutoregressivePrior, Prior
from stage2_prior.priors.pixelcnn import PixelCNN, PixelCNNConfig
from stage2_prior.priors.transformer import Transformer, TransformerConfig

PRIORS: dict[str, type[Prior]] = {"transformer": Transformer, "pixelcnn": PixelCNN}
PriorConfig = TransformerConfig | PixelCNNConfig

__all__ = [
    "PRIORS",
    "AutoregressivePrior",
    "PixelCNN",
    "PixelCNNConfig",
    "Prior",
    "PriorConfig",
    "Transformer",
    "TransformerConfig",
]
