"""Semantic alignment: code vectors, seen through a linear map that learns, point where the features of a frozen network
point that was trained to tell what is on pictures. Codes then tell what is where, and priors predict them more easily.

Li et al. 2024 (XQ-GAN, arXiv:2412.01762) and Yao & Wang 2025 (VA-VAE, arXiv:2501.01423, section 3.2, whose cosine term
it is), with DINOv2's features; here of any backbone of timm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from stage1_vq.losses.features import FrozenFeatures, check_channels
from training.optimizers import OptimizerSettings

COMPANION = "alignment"  # its name in checkpoints and in the log


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Code vectors like the features of a frozen network."""

    weight: float = 0.0  # of the loss; 0 builds and computes nothing, 0.1 to 0.5 is common
    backbone: str = "vit_small_patch14_dinov2.lvd142m"  # any timm model that knows features_only=True
    weights: str | None = None  # a local file with the backbone's weights
    download: bool = False  # let timm fetch the weights once
    layer: int | None = None  # which of the backbone's feature maps; null: the last of those that timm gives
    learning_rate: float = 1e-3  # of the linear map

    def __post_init__(self) -> None:
        rules = [
            ("weight", self.weight >= 0, "0 (off) or more"),
            (
                "layer",
                self.layer is None or self.layer >= 0,
                "a feature map's number from 0, or null for the last",
            ),
            ("learning_rate", self.learning_rate > 0, "above 0"),
        ]
        for name, valid, expected in rules:
            if not valid:
                raise UserError(f"alignment.{name}={getattr(self, name)}, expected {expected}")


class Alignment(nn.Module):
    """A companion of the autoencoder (training.task.Companion): the linear map, which learns by the same loss as the
    code vectors, of which each hears half: neither gets the other's gradient."""

    def __init__(self, config: AlignmentConfig, channels: int, width: int, *, places: bool) -> None:
        """channels: of the images; width: of code vectors; places: whether each is of one in the image, else their mean
        is compared with that of the features. Raises UserError, without weights one that says how to get them."""
        super().__init__()
        check_channels(channels, "alignment")
        self.config, self.places = config, places
        layers = None if config.layer is None else (config.layer,)
        self.features = FrozenFeatures(config.backbone, config.weights, config.download, layers, "alignment")
        self.projection = nn.Conv2d(width, self.features.channels[-1], 1)
        self.optimizer = OptimizerSettings(betas=(0.9, 0.99))

    def learning_rate(self, step: int) -> float:
        return self.config.learning_rate

    def losses(self, z_q: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z_q: b d h w, code vectors with their graph; images: b c H W in [-1, 1]. Returns 1 minus the mean cosine of
        what the code vectors become with the features, times the weight, whose gradient is theirs alone; and the same,
        not weighted, by its name as a companion, whose gradient is the linear map's."""
        with torch.autocast(z_q.device.type, enabled=False):
            with torch.no_grad():
                features = self.targets(images, z_q)
            weight, bias = self.projection.weight, self.projection.bias
            assert bias is not None
            heard = self.distance(F.conv2d(z_q.float(), weight.detach(), bias.detach()), features)
            own = self.distance(F.conv2d(z_q.detach().float(), weight, bias), features)
        return self.config.weight * heard, {COMPANION: own}

    def targets(self, images: Tensor, z_q: Tensor) -> Tensor:
        """Features at the places of the code vectors, or their mean: b c h w."""
        features = self.features(images)[-1].float()
        if not self.places:
            return features.mean((2, 3), keepdim=True)
        return F.interpolate(features, z_q.shape[2:], mode="bilinear", antialias=True, align_corners=False)

    def distance(self, projected: Tensor, features: Tensor) -> Tensor:
        """1 minus the cosine, a mean over images and places."""
        if not self.places:
            projected = projected.mean((2, 3), keepdim=True)
        return 1 - F.cosine_similarity(projected, features, dim=1).mean()
