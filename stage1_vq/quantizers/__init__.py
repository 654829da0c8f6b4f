"""Quantizers by the `kind` of their config."""

from __future__ import annotations

from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig

QuantizerConfig = NearestQuantizerConfig

QUANTIZERS = {"nearest": NearestQuantizer}
QUANTIZER_CONFIGS = {"nearest": NearestQuantizerConfig}

__all__ = [
    "QUANTIZERS",
    "QUANTIZER_CONFIGS",
    "NearestQuantizer",
    "NearestQuantizerConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
]
