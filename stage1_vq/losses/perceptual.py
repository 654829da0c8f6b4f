"""Perceptual losses: how far apart two images are in the features of a pretrained network, which stays as it is.

`lpips`: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
(arXiv:1801.03924), with the VGG16 features and the learned linear weights that VQ-GAN trained with (metrics/lpips.py).
`timm`: the same distance without learned weights, in the features of any timm backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from metrics.lpips import LPIPS, SMALLEST_SIDE, Words, sum_of_distances
from stage1_vq.losses.features import FrozenFeatures, check_channels

WORDS = Words(
    "perceptual.kind=lpips",
    "perceptual.weights",
    "perceptual.download=true",
    "perceptual.linear_weights",
    "perceptual.weight=0 to train without a perceptual loss",
)


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """Learned perceptual image patch similarity, on VGG16."""

    kind: Literal["lpips"] = "lpips"
    weight: float = 0.0  # of the loss; 0 builds and computes nothing, the VQ-GAN paper has 1
    weights: str | None = None  # torchvision's VGG16 file; None: the one in torch's cache, if it is there
    download: bool = False  # fetch that file into the cache, once, where it is not there: 528 MB
    linear_weights: str | None = None  # LPIPS' own small file vgg.pth; None: the copy that torchmetrics ships

    def __post_init__(self) -> None:
        check_weight(self.weight)


@dataclass(frozen=True, kw_only=True)
class TimmPerceptualConfig:
    """Distance in the normalised features of a timm backbone."""

    kind: Literal["timm"] = "timm"
    weight: float = 0.0  # of the loss; 0 builds and computes nothing
    backbone: str = "resnet50.a1_in1k"  # any timm model that knows features_only=True
    weights: str | None = None  # a local file with the backbone's weights
    download: bool = False  # let timm fetch the weights once
    layers: tuple[int, ...] | None = None  # which of its feature maps; None: those that timm gives by default

    def __post_init__(self) -> None:
        check_weight(self.weight)


PerceptualConfig = LPIPSConfig | TimmPerceptualConfig


def check_weight(weight: float) -> None:
    if weight < 0:
        raise UserError(f"perceptual.weight={weight}, expected 0 (off) or more")


def lpips_of(config: LPIPSConfig) -> LPIPS:
    return LPIPS(config.weights, config.download, config.linear_weights, WORDS)


class TimmPerceptual(nn.Module):
    """The mean over a backbone's feature maps of the squared distance of unit feature vectors."""

    def __init__(self, config: TimmPerceptualConfig) -> None:
        super().__init__()
        self.features = FrozenFeatures(config.backbone, config.weights, config.download, config.layers, "perceptual")

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """b c H W each, in [-1, 1]; returns b. Gradients reach `images` only."""
        weights = [torch.ones(1, width, 1, 1, device=images.device) for width in self.features.channels]
        return sum_of_distances(self.features, images, targets, weights) / len(weights)


class PerceptualLoss(nn.Module):
    """A perceptual distance and its weight in the training loss."""

    def __init__(self, config: PerceptualConfig, channels: int, image_size: tuple[int, int]) -> None:
        """channels, image_size (H, W): of the images. Raises UserError, without weights one that says which file is
        missing."""
        super().__init__()
        check_channels(channels, "perceptual")
        if isinstance(config, LPIPSConfig) and min(image_size) < SMALLEST_SIDE:
            raise UserError(
                f"perceptual.kind=lpips needs images of at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels, got "
                f"{image_size[0]}x{image_size[1]}; train on larger ones, or give perceptual.kind=timm "
                "or perceptual.weight=0"
            )
        self.weight = config.weight
        self.distance = lpips_of(config) if isinstance(config, LPIPSConfig) else TimmPerceptual(config)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The distance, not weighted, of each image: b, float32. Gradients reach `images` only."""
        return self.distance(images, targets)
