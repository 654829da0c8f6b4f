"""Open-MAGVIT2's tokenizer of images (Luo et al. 2024, arXiv:2409.04410): that of MAGVIT-v2 (Yu et al. 2023,
arXiv:2310.05737) for single frames, around codes without lookup.

Where the papers are silent this is written after its published weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_vq.autoencoders.base import QuantizedAutoencoder
from stage1_vq.losses.pixel_errors import check_error_weights, pixel_errors
from stage1_vq.networks.levels import check_levels
from stage1_vq.networks.resnet import EPSILON, Norm
from stage1_vq.quantizers import LFQConfig, QuantizerConfig, build_quantizer


@dataclass(frozen=True, kw_only=True)
class OpenMAGVIT2Config:
    """The defaults are the published networks for ImageNet at 256x256 pixels: 16x16 codes of 18 bits."""

    kind: Literal["open_magvit2"] = "open_magvit2"
    channels: int = 3  # c of the images: 3 for colour, 1 for grey
    width: int = 128  # channels at the resolution of the images
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of the width, at each level; each after the first halves the sides
    residual_blocks: int = 4  # at each level of encoder and decoder, and at the lowest resolution between the two
    norm_groups: int = 32  # of the group norms
    l1_weight: float = 1.0  # of the absolute error, in the reconstruction loss
    l2_weight: float = 0.0  # of the squared error
    quantizer: QuantizerConfig = field(default_factory=LFQConfig)

    def __post_init__(self) -> None:
        check_levels(self)
        check_error_weights(self, "l1_weight=1 is common")

    @property
    def stride(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


class Block(nn.Module):
    """x + conv3x3(swish(norm(conv3x3(swish(norm(x)))))), with a 1x1 convolution of x where the width changes; none has
    a bias."""

    def __init__(self, channels_in: int, channels_out: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = Norm(channels_in, norm_groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = Norm(channels_out, norm_groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm2.swish(self.conv1(self.norm1.swish(x))))
        return self.nin_shortcut(x) + y


def blocks(widths: Sequence[int], norm_groups: int) -> nn.Sequential:
    return nn.Sequential(*(Block(*pair, norm_groups) for pair in pairwise(widths)))


class AdaptiveGroupNorm(nn.Module):
    """A group norm whose scale and shift, the same at all places, are linear in what the code vectors of the whole
    image are like: the scale in their standard deviation, the shift in their mean, of each channel (MAGVIT-v2,
    appendix A)."""

    def __init__(self, channels: int, groups: int, latent_channels: int) -> None:
        super().__init__()
        self.groups = groups
        self.gamma = nn.Linear(latent_channels, channels)
        self.beta = nn.Linear(latent_channels, channels)

    def forward(self, x: Tensor, z_q: Tensor) -> Tensor:
        """x: b c H W; z_q: b d h w."""
        vectors = rearrange(z_q.float(), "b d h w -> b d (h w)")
        # Unbiased, as in the published model; of a single code, which has no such variance, 0.
        variance = vectors.var(2, correction=min(1, vectors.shape[2] - 1))
        scale = self.gamma((variance + EPSILON).sqrt().to(z_q.dtype))
        shift = self.beta(vectors.mean(2).to(z_q.dtype))
        normed = F.group_norm(x, self.groups, eps=EPSILON)
        return normed * rearrange(scale, "b c -> b c 1 1") + rearrange(shift, "b c -> b c 1 1")


class Upsample(nn.Module):
    """A 3x3 convolution to four times the channels; each place becomes four, to which they go in turn."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # The place comes first, then the channel: `F.pixel_shuffle` has them the other way about.
        return rearrange(self.conv1(x), "b (tall wide c) h w -> b c (h tall) (w wide)", tall=2, wide=2)


class DownLevel(nn.Module):
    """Residual blocks; then a 3x3 convolution of stride 2, padded on all sides, but in the last level."""

    recompute = "parts"

    def __init__(self, widths: Sequence[int], norm_groups: int, *, last: bool) -> None:
        super().__init__()
        self.block = blocks(widths, norm_groups)
        self.downsample = None if last else nn.Conv2d(widths[-1], widths[-1], 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nn.Module):
    """Residual blocks; then twice the resolution, but in the last level."""

    recompute = "parts"

    def __init__(self, widths: Sequence[int], norm_groups: int, *, last: bool) -> None:
        super().__init__()
        self.block = blocks(widths, norm_groups)
        self.upsample = None if last else Upsample(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x if self.upsample is None else self.upsample(x)


class Encoder(nn.Module):
    """Images, b c H W -> z."""

    def __init__(self, config: OpenMAGVIT2Config, dim: int) -> None:
        super().__init__()
        groups, last = config.norm_groups, len(config.multipliers) - 1
        widths = [config.width, *(config.width * multiplier for multiplier in config.multipliers)]
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            DownLevel([before, *config.residual_blocks * [own]], groups, last=level == last)
            for level, (before, own) in enumerate(pairwise(widths))
        )
        self.mid_block = blocks((config.residual_blocks + 1) * [widths[-1]], groups)
        self.norm_out = Norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out.swish(self.mid_block(x)))


class Decoder(nn.Module):
    """z_q -> images. `up` and `adaptive` number levels from fine to coarse, as `down` does."""

    def __init__(self, config: OpenMAGVIT2Config, dim: int) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.width * multiplier for multiplier in config.multipliers]
        befores = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid_block = blocks((config.residual_blocks + 1) * [widths[-1]], groups)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(before, groups, dim) for before in befores)
        self.up = nn.ModuleList(
            UpLevel([before, *config.residual_blocks * [own]], groups, last=level == 0)
            for level, (before, own) in enumerate(zip(befores, widths, strict=True))
        )
        self.norm_out = Norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(z_q))

    def trunk(self, z_q: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z_q))
        for adaptive, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            x = level(adaptive(x, z_q))
        return self.norm_out.swish(x)

    def last(self, features: Tensor) -> Tensor:
        return self.conv_out(features)


class OpenMAGVIT2(QuantizedAutoencoder):
    """images -> residual network -> z -> signs -> z_q -> residual network, whose norms see z_q -> images, with no
    attention, and no convolution around the quantizer."""

    kind = "open_magvit2"
    config_class = OpenMAGVIT2Config
    config: OpenMAGVIT2Config
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: OpenMAGVIT2Config, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = Encoder(config, self.quantizer.dim)
        self.decoder = Decoder(config, self.quantizer.dim_out)

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        return pixel_errors(self.config, decoded, images)

    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.get_parameter("weight")
