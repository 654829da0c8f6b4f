"""Decoders by the `kind` of their config: a network of one pass, or one that says pixels after others."""

from __future__ import annotations

from typing import Any

from stage1_vae.decoders.base import Decoder
from stage1_vae.decoders.factorised import FactorisedDecoder
from stage1_vae.decoders.interleaved import InterleavedConfig, InterleavedDecoder
from stage1_vae.decoders.pixelcnn import PixelCNNDecoder
from stage1_vae.likelihoods import Likelihood
from stage1_vae.networks import NetworkConfig, build_decoder_network, network_config
from stage1_vae.networks.pixelcnn import PixelCNNDecoderConfig
from stage1_vae.networks.spatial import SpatialConfig, SpatialDecoder
from stage1_vae.posteriors.base import LatentShape

DecoderConfig = NetworkConfig | InterleavedConfig | PixelCNNDecoderConfig | SpatialConfig


def decoder_config(fields: dict[str, Any]) -> DecoderConfig:
    """The config that `dataclasses.asdict` made `fields` of."""
    if fields["kind"] == "pixelcnn":
        return PixelCNNDecoderConfig(**{**fields, "network": network_config(fields["network"])})
    if fields["kind"] in ("interleaved", "spatial"):
        return InterleavedConfig(**fields) if fields["kind"] == "interleaved" else SpatialConfig(**fields)
    return network_config(fields)


def build_decoder(
    config: DecoderConfig, likelihood: Likelihood, shape: LatentShape, image_size: tuple[int, int]
) -> Decoder:
    """shape: of latents; image_size: (H, W). Raises UserError for a size that the decoder cannot have."""
    if isinstance(config, PixelCNNDecoderConfig):
        return PixelCNNDecoder(config, likelihood, shape, image_size)
    if isinstance(config, InterleavedConfig):
        return InterleavedDecoder(config, likelihood, shape, image_size)
    if isinstance(config, SpatialConfig):
        return FactorisedDecoder(SpatialDecoder(config, shape, (likelihood.outputs, *image_size)), likelihood)
    return FactorisedDecoder(build_decoder_network(config, shape, (likelihood.outputs, *image_size)), likelihood)


__all__ = [
    "Decoder",
    "DecoderConfig",
    "FactorisedDecoder",
    "InterleavedConfig",
    "InterleavedDecoder",
    "PixelCNNDecoder",
    "PixelCNNDecoderConfig",
    "SpatialConfig",
    "build_decoder",
    "decoder_config",
]
