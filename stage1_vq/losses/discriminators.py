"""Discriminators: images in, logits out, high where an image looks real.

`patchgan` judges patches (Isola et al. 2017, arXiv:1611.07004), as VQ-GAN has it; `stylegan` whole images (Karras et
al. 2020, arXiv:1912.04958), as ViT-VQGAN has it; `features` the positions of feature maps of a frozen pretrained
network (Sauer et al. 2021, arXiv:2111.01007; Sauer et al. 2023, arXiv:2301.09515).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.distributed import moments_of_all, several_processes
from common.errors import UserError
from stage1_vq.losses.features import FrozenFeatures, check_channels


@dataclass(frozen=True, kw_only=True)
class PatchGANConfig:
    """The defaults are those of VQ-GAN, for images from 128 pixels or so."""

    kind: Literal["patchgan"] = "patchgan"
    width: int = 64  # channels of the first layer; they double with each
    layers: int = 3  # after the first: one convolution of stride 1, the others of stride 2; more see larger patches
    norm: Literal["batch", "actnorm", "group"] = "batch"  # group: no statistics of the batch, each image by itself

    def __post_init__(self) -> None:
        check_at_least_one(self, "width", "layers")
        if self.norm not in ("batch", "actnorm", "group"):
            raise UserError(f"adversarial.discriminator.norm={self.norm}, expected batch, actnorm or group")
        if self.norm == "group" and self.width % 4:
            raise UserError(f"adversarial.discriminator.width={self.width}, expected a multiple of 4 for norm=group")


@dataclass(frozen=True, kw_only=True)
class StyleGANDiscriminatorConfig:
    """The residual discriminator of StyleGAN2."""

    kind: Literal["stylegan"] = "stylegan"
    width: int = 64  # channels at full size; they double as the image is halved
    max_width: int = 512
    stddev_group: int = 0  # images whose standard deviation the last layers see, StyleGAN2 has 4; 0 is off

    def __post_init__(self) -> None:
        check_at_least_one(self, "width", "max_width")
        if self.stddev_group < 0:
            raise UserError(f"adversarial.discriminator.stddev_group={self.stddev_group}, expected 0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class FeatureDiscriminatorConfig:
    """A frozen pretrained backbone with light heads that learn."""

    kind: Literal["features"] = "features"
    backbone: str = "vit_small_patch16_224.dino"  # any timm model that knows features_only=True
    weights: str | None = None  # a local file with the backbone's weights
    download: bool = False  # let timm fetch the weights once
    layers: tuple[int, ...] | None = (2, 5, 8, 11)  # which of its feature maps, one head each; null: timm's default
    width: int = 64  # channels inside a head

    def __post_init__(self) -> None:
        check_at_least_one(self, "width")
        if self.width % 4:
            raise UserError(f"adversarial.discriminator.width={self.width}, expected a multiple of 4")


DiscriminatorConfig = PatchGANConfig | StyleGANDiscriminatorConfig | FeatureDiscriminatorConfig


def check_at_least_one(config: DiscriminatorConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"adversarial.discriminator.{name}={getattr(config, name)}, expected at least 1")


def build_discriminator(config: DiscriminatorConfig, channels: int, image_size: tuple[int, int]) -> nn.Module:
    """channels, image_size (H, W): of the images. The module takes b c H W in [-1, 1] and returns logits, b first.
    Raises UserError where such images are too small for it."""
    if isinstance(config, PatchGANConfig):
        deepest = int(math.log2(min(image_size) / 3)) if min(image_size) >= 6 else 0
        if config.layers > deepest:
            raise UserError(
                f"adversarial.discriminator.layers={config.layers} leaves nothing of {image_size[0]}x{image_size[1]} "
                + (f"images: give at most {deepest}" if deepest else "images: train on images of 6x6 pixels or more")
            )
        return PatchGAN(config, channels)
    if isinstance(config, StyleGANDiscriminatorConfig):
        return StyleGANDiscriminator(config, channels, image_size)
    check_channels(channels, "adversarial")
    return FeatureDiscriminator(config)


# ---- PatchGAN -------------------------------------------------------------------------------------------------------


class PatchGAN(nn.Module):
    """4x4 convolutions, of stride 2 but for the last two: logits b 1 h w, one per patch."""

    def __init__(self, config: PatchGANConfig, channels: int) -> None:
        super().__init__()
        widths = [config.width * min(2**layer, 8) for layer in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.layers + 1):
            stride = 2 if layer < config.layers else 1
            biased = config.norm == "actnorm"  # the other norms have biases of their own
            layers.append(nn.Conv2d(widths[layer - 1], widths[layer], 4, stride, padding=1, bias=biased))
            layers += [make_norm(config.norm, widths[layer]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        for module in self.main:  # as Isola et al. start, from Radford et al. 2015
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def make_norm(kind: str, width: int) -> nn.Module:
    if kind == "batch":
        return BatchNormOfAll(width)
    return ActNorm(width) if kind == "actnorm" else nn.GroupNorm(math.gcd(width, 32), width)


class BatchNormOfAll(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' images: torch's SyncBatchNorm, which needs GPUs, for any
    device. With one process it is nn.BatchNorm2d.

    In training each forward pass, the generator's included, moves the running averages; only eval mode uses them, and
    nothing trains in eval mode.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and several_processes()):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            mean, variance, count = moments_of_all(values)
            with torch.no_grad():
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                momentum = self.momentum or 0.0
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.flatten(), momentum)
                self.running_var.lerp_((variance * (count / (count - 1))).flatten(), momentum)
            normalised = (values - mean) * (variance + self.eps).rsqrt()
            return (normalised * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class ActNorm(nn.Module):
    """A scale and a shift per channel that learn, and start so that the first batch comes out with mean 0 and standard
    deviation 1 (Kingma and Dhariwal 2018, arXiv:1807.03039)."""

    initialized: Tensor  # scalar, 0 or 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, width, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.started = False  # spares asking the device at each pass

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.started:
            self.started = bool(self.initialized) or self.start(x.detach().float())
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def start(self, x: Tensor) -> bool:
        """x: b c h w. Whether it was possible: a batch that is not finite must not stay in the weights for ever."""
        mean, variance, count = moments_of_all(x)
        spread = (variance * (count / (count - 1))).sqrt()
        if not bool((mean.isfinite() & spread.isfinite()).all()):
            return False
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (spread + 1e-6))
        self.initialized.fill_(1)
        return True

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.started = False
        super()._load_from_state_dict(*arguments)


# ---- StyleGAN2 ------------------------------------------------------------------------------------------------------

LAST_SIDE = 4  # pixels of the maps that the last layers see


class StyleGANDiscriminator(nn.Module):
    """Residual blocks that halve the image until its shorter side has 4 pixels, and two layers that see all of it:
    logits b 1. Maps of another size than 4x4, of images that are not square, are pooled to it first."""

    def __init__(self, config: StyleGANDiscriminatorConfig, channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        halvings = max(0, int(math.log2(min(image_size) / LAST_SIDE)))
        widths = [min(config.width * 2**level, config.max_width) for level in range(halvings + 1)]
        self.first = ScaledConv(channels, widths[0], 1)
        self.blocks = nn.Sequential(*(StyleGANBlock(*pair) for pair in pairwise(widths)))
        self.stddev_group = config.stddev_group
        self.last = ScaledConv(widths[-1] + (config.stddev_group > 0), widths[-1], 3)
        self.hidden = ScaledLinear(widths[-1] * LAST_SIDE**2, widths[-1])
        self.logits = ScaledLinear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(activate(self.first(images)))
        if self.stddev_group:
            x = with_stddev(x, self.stddev_group)
        x = activate(self.last(x))
        if x.shape[2:] != (LAST_SIDE, LAST_SIDE):
            x = F.adaptive_avg_pool2d(x, LAST_SIDE)
        return self.logits(activate(self.hidden(x.flatten(1))))


class StyleGANBlock(nn.Module):
    """Half the size: (two convolutions + a 1x1 one beside them) / sqrt(2)."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.keep = ScaledConv(width, width, 3)
        self.down = ScaledConv(width, wider, 3, down=True)
        self.skip = ScaledConv(width, wider, 1, down=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (activate(self.down(activate(self.keep(x)))) + self.skip(x)) * math.sqrt(0.5)


class ScaledConv(nn.Module):
    """A convolution whose weights are stored with variance 1 and scaled when used, so that Adam moves all layers alike
    (Karras et al. 2018, arXiv:1710.10196); `down` halves the size, after a blur (Zhang 2019, arXiv:1904.11486)."""

    blur: Tensor

    def __init__(self, width: int, wider: int, kernel: int, *, down: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wider, width, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(wider)) if bias else None
        self.gain = 1 / math.sqrt(width * kernel**2)
        self.kernel, self.down = kernel, down
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", torch.outer(binomial, binomial)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gain
        if not self.down:
            return F.conv2d(x, weight, self.bias, padding=self.kernel // 2)
        width, margin = x.shape[1], (self.kernel + 1) // 2
        x = F.conv2d(x, self.blur.to(x.dtype).expand(width, -1, -1, -1), padding=margin, groups=width)
        return F.conv2d(x, weight, self.bias, stride=2)


class ScaledLinear(nn.Module):
    """As ScaledConv."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wider, width))
        self.bias = nn.Parameter(torch.zeros(wider))
        self.gain = 1 / math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, scaled to keep the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def with_stddev(x: Tensor, group: int) -> Tensor:
    """b c h w with one more channel: the mean standard deviation over each group of images (Karras et al. 2018). A
    logit then depends on its group, and groups are of one process's micro-batch."""
    size = math.gcd(len(x), group)
    groups = rearrange(x.float(), "(size number) c h w -> size number c h w", size=size)
    spread = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # number
    plane = spread.repeat(size).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, plane.to(x.dtype)], dim=1)


# ---- frozen features ------------------------------------------------------------------------------------------------


class FeatureDiscriminator(nn.Module):
    """A head on each feature map of the backbone: logits b n, one per position of each map.

    The heads have group norms where the papers have spectral or batch norms: a logit depends on its image alone, and no
    state changes in a forward pass.
    """

    def __init__(self, config: FeatureDiscriminatorConfig) -> None:
        super().__init__()
        self.features = FrozenFeatures(
            config.backbone, config.weights, config.download, config.layers, "adversarial.discriminator"
        )
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, config.width, 1),
                nn.GroupNorm(4, config.width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(config.width, config.width, 3, padding=1),
                nn.GroupNorm(4, config.width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(config.width, 1, 1),
            )
            for width in self.features.channels
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = self.features(images)
        return torch.cat([head(map_).flatten(1) for head, map_ in zip(self.heads, maps, strict=True)], dim=1)
