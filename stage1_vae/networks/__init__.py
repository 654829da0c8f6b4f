"""Networks between images and latents, by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from torch import nn

from stage1_vae.networks.convolutional import ConvolutionalConfig, ConvolutionalDecoder, ConvolutionalEncoder
from stage1_vae.networks.dense import DenseConfig, DenseDecoder, DenseEncoder
from stage1_vae.networks.titok import TiTokDecoder, TiTokEncoder, TiTokNetworkConfig
from stage1_vae.posteriors.base import LatentShape

NetworkConfig = DenseConfig | ConvolutionalConfig | TiTokNetworkConfig

NETWORKS: dict[str, Any] = {  # an encoder, a decoder, and the config of both
    "dense": (DenseEncoder, DenseDecoder, DenseConfig),
    "convolutional": (ConvolutionalEncoder, ConvolutionalDecoder, ConvolutionalConfig),
    "titok": (TiTokEncoder, TiTokDecoder, TiTokNetworkConfig),
}


def network_config(fields: dict[str, Any]) -> NetworkConfig:
    """The config that `dataclasses.asdict` made `fields` of."""
    return NETWORKS[fields["kind"]][2](**fields)


def latent_shape(config: NetworkConfig, latents: int, image_size: tuple[int, int]) -> LatentShape:
    """Of the latents of images (H, W), given their encoder's config: (latents,), or (latents, h, w) of a map, which a
    row of tokens is too."""
    if isinstance(config, TiTokNetworkConfig):
        return (latents, 1, config.tokens)
    if isinstance(config, ConvolutionalConfig) and config.map:
        return (latents, *config.lowest_size(image_size))
    return (latents,)


def build_encoder(config: NetworkConfig, image_shape: tuple[int, int, int], features: int) -> nn.Module:
    """Images `b c H W` -> `b features`, or `b features h w` for a map. image_shape: (c, H, W)."""
    return NETWORKS[config.kind][0](config, image_shape, features)


def build_decoder_network(config: NetworkConfig, shape: LatentShape, output_shape: tuple[int, int, int]) -> nn.Module:
    """Latents `n *shape` -> `n o H W`. output_shape: (o, H, W)."""
    return NETWORKS[config.kind][1](config, shape, output_shape)


__all__ = [
    "NETWORKS",
    "ConvolutionalConfig",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "DenseConfig",
    "DenseDecoder",
    "DenseEncoder",
    "NetworkConfig",
    "TiTokDecoder",
    "TiTokEncoder",
    "TiTokNetworkConfig",
    "build_decoder_network",
    "build_encoder",
    "latent_shape",
    "network_config",
]
