"""The VQ-GAN of MaskGIT (Chang et al. 2022, "MaskGIT: Masked Generative Image Transformer", arXiv:2202.04200): residual
networks without attention, and hardly a bias, around the codes of many priors and tokenizers since.

Written after its published weights, whose networks the paper does not describe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.losses.pixel_errors import check_error_weights, pixel_errors
from stage1_vq.networks.levels import check_levels
from stage1_vq.networks.resnet import Norm
from stage1_vq.quantizers import NearestQuantizerConfig, QuantizerConfig, build_quantizer


def published_quantizer() -> NearestQuantizerConfig:
    return NearestQuantizerConfig(
        codebook_size=1024, dim=256, codebook_update="gradient", kmeans_iterations=0, revive_after=0
    )


@dataclass(frozen=True, kw_only=True)
class MaskGITVQGANConfig:
    """The defaults are the published networks for ImageNet at 256x256 pixels: 16x16 codes."""

    kind: Literal["maskgit_vqgan"] = "maskgit_vqgan"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    width: int = 128  # channels at the resolution of the images
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of the width, at each level; each after the first halves the sides
    residual_blocks: int = 2  # at each level of encoder and decoder
    norm_groups: int = 32  # of the group norms
    l1_weight: float = 1.0  # of the absolute error, in the reconstruction loss
    l2_weight: float = 0.0  # of the squared error
    quantizer: QuantizerConfig = field(default_factory=published_quantizer)

    def __post_init__(self) -> None:
        check_levels(self)
        check_error_weights(self, "l1_weight=1 is common")

    @property
    def stride(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


class Block(nn.Module):
    """x + y of y = conv(swish(norm(conv(swish(norm(x)))))); where the width changes, shortcut(y) + y: the published
    weights were trained so, and x itself does not come through."""

    def __init__(self, channels_in: int, channels_out: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = Norm(channels_in, norm_groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = Norm(channels_out, norm_groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        changes = channels_in != channels_out
        self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm2.swish(self.conv1(self.norm1.swish(x))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(y)) + y


def blocks(widths: Sequence[int], norm_groups: int) -> nn.Sequential:
    return nn.Sequential(*(Block(*pair, norm_groups) for pair in pairwise(widths)))


class DownLevel(nn.Module):
    """Residual blocks; then the mean of each 2x2 places, but in the last level."""

    recompute = "parts"

    def __init__(self, widths: Sequence[int], norm_groups: int, *, last: bool) -> None:
        super().__init__()
        self.block = blocks(widths, norm_groups)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x if self.last else F.avg_pool2d(x, 2)


class UpLevel(nn.Module):
    """Residual blocks; then each place becomes four, and a 3x3 convolution, but in the last level."""

    recompute = "parts"

    def __init__(self, widths: Sequence[int], norm_groups: int, *, last: bool) -> None:
        super().__init__()
        self.block = blocks(widths, norm_groups)
        self.upsample_conv = None if last else nn.Conv2d(widths[-1], widths[-1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0))


class Encoder(nn.Module):
    """Images, b c H W in [-1, 1] -> z. The networks see pixels from 0 to 1, so that beyond the border all is black."""

    def __init__(self, config: MaskGITVQGANConfig, dim: int) -> None:
        super().__init__()
        groups, last = config.norm_groups, len(config.multipliers) - 1
        widths = [config.width, *(config.width * multiplier for multiplier in config.multipliers)]
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            DownLevel([before, *config.residual_blocks * [own]], groups, last=level == last)
            for level, (before, own) in enumerate(pairwise(widths))
        )
        self.mid = blocks(3 * [widths[-1]], groups)
        self.norm_out = Norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images / 2 + 0.5)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out.swish(self.mid(x)))


class Decoder(nn.Module):
    """z_q -> images. `up` numbers levels from fine to coarse, as `down` does."""

    def __init__(self, config: MaskGITVQGANConfig, dim: int) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.width * multiplier for multiplier in config.multipliers]
        befores = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = blocks(3 * [widths[-1]], groups)
        self.up = nn.ModuleList(
            UpLevel([before, *config.residual_blocks * [own]], groups, last=level == 0)
            for level, (before, own) in enumerate(zip(befores, widths, strict=True))
        )
        self.norm_out = Norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))

    def trunk(self, z_q: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z_q))
        for level in reversed(self.up):
            x = level(x)
        return self.norm_out.swish(x)

    def last(self, features: Tensor) -> Tensor:
        return self.conv_out(features)


class MaskGITVQGAN(QuantizedAutoencoder):
    """images -> residual network -> z -> quantizer -> z_q -> residual network -> images, with no convolution around the
    quantizer."""

    kind = "maskgit_vqgan"
    config_class = MaskGITVQGANConfig
    config: MaskGITVQGANConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: MaskGITVQGANConfig, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = Encoder(config, self.quantizer.dim)
        self.decoder = Decoder(config, self.quantizer.dim_out)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        return pixel_errors(self.config, decoded, images)

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.get_parameter("weight")
