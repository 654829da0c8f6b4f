"""Quantizers by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig

QuantizerConfig = NearestQuantizerConfig

QUANTIZERS: dict[str, Any] = {  # classes of Quantizer, each with a config class of its own
    "nearest": NearestQuantizer,
}


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    return QUANTIZERS[config.kind](config)


def quantizer_config(values: Mapping[str, Any]) -> QuantizerConfig:
    """The config that `dataclasses.asdict` made `values` of. Raises KeyError for an unknown kind."""
    return QUANTIZERS[values["kind"]].config_from(values)


__all__ = [
    "QUANTIZERS",
    "NearestQuantizer",
    "NearestQuantizerConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "build_quantizer",
    "quantizer_config",
]
