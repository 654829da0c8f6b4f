"""The tokenizer of Infinity (Han et al. 2024, "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution
Image Synthesis", arXiv:2412.04431): VQ-GAN's networks without attention, around bits on many scales.

Where the paper is silent this is written after its published weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.losses.pixel_errors import check_error_weights, pixel_errors
from stage1_vq.networks.levels import check_levels
from stage1_vq.networks.resnet import MakeNorm, Norm, ResnetBlock, ResnetDecoder, ResnetEncoder
from stage1_vq.quantizers import MultiscaleBSQConfig, QuantizerConfig, build_quantizer


@dataclass(frozen=True, kw_only=True)
class InfinityTokenizerConfig:
    """The defaults are the published networks at 256x256 pixels, with 32 bits to a place: 16x16 places at the last."""

    kind: Literal["infinity_tokenizer"] = "infinity_tokenizer"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    width: int = 128  # channels at the resolution of the images
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)  # of the width, at each level; each after the first halves the sides
    residual_blocks: int = 2  # at each level of the encoder; one more at each of the decoder
    norm_groups: int = 32  # of the group norms
    l1_weight: float = 1.0  # of the absolute error, in the reconstruction loss
    l2_weight: float = 0.0  # of the squared error
    quantizer: QuantizerConfig = field(default_factory=MultiscaleBSQConfig)

    def __post_init__(self) -> None:
        check_levels(self)
        check_error_weights(self, "l1_weight=1 is common")

    @property
    def stride(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    def networks(self, dim: int) -> dict[str, Any]:
        """Arguments of both networks, whose codes are of width `dim`."""
        return {
            "channels": self.channels,
            "z_channels": dim,
            "width": self.width,
            "multipliers": self.multipliers,
            "residual_blocks": self.residual_blocks,
            "attention_levels": (),
            "norm_groups": self.norm_groups,
        }


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, make_norm)
        self.block_2 = ResnetBlock(channels, channels, make_norm)

    def forward(self, x: Tensor, z_q: Tensor | None = None) -> Tensor:
        return self.block_2(self.block_1(x))


def middle_of(config: InfinityTokenizerConfig) -> Middle:
    return Middle(config.width * config.multipliers[-1], lambda channels: Norm(channels, config.norm_groups))


class Encoder(ResnetEncoder):
    """Images, b c H W -> z."""

    def __init__(self, config: InfinityTokenizerConfig, dim: int) -> None:
        super().__init__(**config.networks(dim))
        self.mid = middle_of(config)  # type: ignore[assignment]


class Decoder(ResnetDecoder):
    """z_q -> images."""

    def __init__(self, config: InfinityTokenizerConfig, dim: int) -> None:
        super().__init__(**config.networks(dim))
        self.mid = middle_of(config)  # type: ignore[assignment]

    def last(self, features: Tensor) -> Tensor:
        return self.conv_out(features)


class InfinityTokenizer(QuantizedAutoencoder):
    """images -> residual network -> z -> bits of each scale -> their sum, z_q -> residual network -> images, with no
    attention, and no convolution around the quantizer."""

    kind = "infinity_tokenizer"
    config_class = InfinityTokenizerConfig
    config: InfinityTokenizerConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: InfinityTokenizerConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = Encoder(config, self.quantizer.dim)
        self.decoder = Decoder(config, self.quantizer.dim_out)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        return pixel_errors(self.config, decoded, images)

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.get_parameter("weight")
