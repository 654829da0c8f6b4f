"""Quantizers by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage1_vq.quantizers.base import Quantized, Quantizer
from stage1_vq.quantizers.binary import BinaryQuantizer, BinaryQuantizerConfig
from stage1_vq.quantizers.binary_mapper import BinaryMapper, BinaryMapperConfig
from stage1_vq.quantizers.bsq import BSQConfig, BSQuantizer
from stage1_vq.quantizers.diveq import DiVeQConfig, DiVeQuantizer
from stage1_vq.quantizers.fsp import FSPConfig, FSPQuantizer
from stage1_vq.quantizers.fsq import FSQConfig, FSQuantizer
from stage1_vq.quantizers.fvq import FVQConfig, FVQuantizer
from stage1_vq.quantizers.grouped import GroupedQuantizer, GroupedQuantizerConfig
from stage1_vq.quantizers.gumbel import GumbelQuantizer, GumbelQuantizerConfig
from stage1_vq.quantizers.hierarchical import HierarchicalQuantizer, HierarchicalQuantizerConfig
from stage1_vq.quantizers.ibq import IBQConfig, IBQuantizer
from stage1_vq.quantizers.lfq import LFQConfig, LFQuantizer
from stage1_vq.quantizers.multiscale import MultiscaleQuantizer, MultiscaleQuantizerConfig
from stage1_vq.quantizers.multiscale_bits import MultiscaleBitsConfig, MultiscaleBitsQuantizer
from stage1_vq.quantizers.multiscale_bsq import MultiscaleBSQConfig, MultiscaleBSQuantizer
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from stage1_vq.quantizers.qinco import QINCoConfig, QINCoQuantizer
from stage1_vq.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig
from stage1_vq.quantizers.residual_scalar import ResidualScalarConfig, ResidualScalarQuantizer
from stage1_vq.quantizers.simvq import SimVQConfig, SimVQuantizer

QuantizerConfig = (
    NearestQuantizerConfig
    | FSQConfig
    | LFQConfig
    | BSQConfig
    | SimVQConfig
    | IBQConfig
    | GumbelQuantizerConfig
    | BinaryQuantizerConfig
    | ResidualQuantizerConfig
    | GroupedQuantizerConfig
    | MultiscaleQuantizerConfig
    | DiVeQConfig
    | FSPConfig
    | FVQConfig
    | BinaryMapperConfig
    | ResidualScalarConfig
    | MultiscaleBitsConfig
    | HierarchicalQuantizerConfig
    | MultiscaleBSQConfig
    | QINCoConfig
)

QUANTIZERS: dict[str, Any] = {  # classes of Quantizer, each with a config class of its own
    "nearest": NearestQuantizer,
    "fsq": FSQuantizer,
    "lfq": LFQuantizer,
    "bsq": BSQuantizer,
    "simvq": SimVQuantizer,
    "ibq": IBQuantizer,
    "gumbel": GumbelQuantizer,
    "binary": BinaryQuantizer,
    "residual": ResidualQuantizer,
    "grouped": GroupedQuantizer,
    "multiscale": MultiscaleQuantizer,
    "diveq": DiVeQuantizer,
    "fsp": FSPQuantizer,
    "fvq": FVQuantizer,
    "binary_mapper": BinaryMapper,
    "residual_scalar": ResidualScalarQuantizer,
    "multiscale_bits": MultiscaleBitsQuantizer,
    "hierarchical": HierarchicalQuantizer,
    "multiscale_bsq": MultiscaleBSQuantizer,
    "qinco": QINCoQuantizer,
}


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    return QUANTIZERS[config.kind](config)


def quantizer_config(values: Mapping[str, Any]) -> QuantizerConfig:
    """The config that `dataclasses.asdict` made `values` of. Raises KeyError for an unknown kind."""
    return QUANTIZERS[values["kind"]].config_from(values)


__all__ = [
    "QUANTIZERS",
    "BSQConfig",
    "BSQuantizer",
    "BinaryMapper",
    "BinaryMapperConfig",
    "BinaryQuantizer",
    "BinaryQuantizerConfig",
    "DiVeQConfig",
    "DiVeQuantizer",
    "FSPConfig",
    "FSPQuantizer",
    "FSQConfig",
    "FSQuantizer",
    "FVQConfig",
    "FVQuantizer",
    "GroupedQuantizer",
    "GroupedQuantizerConfig",
    "GumbelQuantizer",
    "GumbelQuantizerConfig",
    "HierarchicalQuantizer",
    "HierarchicalQuantizerConfig",
    "IBQConfig",
    "IBQuantizer",
    "LFQConfig",
    "LFQuantizer",
    "MultiscaleBSQConfig",
    "MultiscaleBSQuantizer",
    "MultiscaleBitsConfig",
    "MultiscaleBitsQuantizer",
    "MultiscaleQuantizer",
    "MultiscaleQuantizerConfig",
    "NearestQuantizer",
    "NearestQuantizerConfig",
    "QINCoConfig",
    "QINCoQuantizer",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "ResidualScalarConfig",
    "ResidualScalarQuantizer",
    "SimVQConfig",
    "SimVQuantizer",
    "build_quantizer",
    "quantizer_config",
]
