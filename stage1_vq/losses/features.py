"""Features of networks that are never trained: what perceptual losses compare and feature discriminators judge."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.timm_models import DOWNLOAD, Asking, check_name, published_at
from metrics.lpips import FrozenNetwork, as_colour
from stage1_vq.networks.timm_features import TimmFeatures


class FrozenFeatures(nn.Module):
    """Feature maps of a frozen network of timm with its pretrained weights, from fine to coarse."""

    def __init__(
        self, backbone: str, weights: str | None, download: bool, layers: tuple[int, ...] | None, where: str
    ) -> None:
        """backbone: a timm model's name; weights: a local file with its weights; download: whether timm may fetch them;
        layers: which of the backbone's feature maps, None for those that timm gives by default; where: the path of
        these options in the config, for error messages. Raises UserError."""
        super().__init__()
        without = f"{where.split('.')[0]}.weight=0 to train without"
        asking = Asking(f"{where}.backbone", f"{where}.weights", without)
        check_name(backbone, asking)
        if weights is None and not download:
            raise UserError(
                f"{where}.backbone={backbone} needs its pretrained weights: put the file that timm publishes "
                f"({published_at(backbone) or 'none of it'}; some 4 MB per million weights) on this machine and name "
                f"it by {where}.weights, or give {where}.download=true to fetch it once, or {without}"
            )
        network = TimmFeatures(backbone, layers, asking)
        network.load_pretrained(DOWNLOAD if weights is None else weights)
        self.channels = network.widths
        self.side = network.fixed_side
        self.network = FrozenNetwork(network)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: b c H W in [-1, 1], c 1 or 3. Returns maps b c' h' w'."""
        pixels = as_colour(images).float()
        if self.side is not None:  # a transformer whose positions are learned for one size
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return self.network(pixels)


def check_channels(channels: int, what: str) -> None:
    """Raises UserError unless images are grey or colour."""
    if channels not in (1, 3):
        raise UserError(f"{what} sees grey and colour images, and data.channels is {channels}; give {what}.weight=0")
