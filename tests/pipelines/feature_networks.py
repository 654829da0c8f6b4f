"""Small networks for figures of features, as `MODULE:FUNCTION` names them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pooled(nn.Module):
    """Means of the parts of an image, and, of a classifier, logits of three classes: which of three corners of an image
    is bright."""

    def __init__(self, side: int, classes: bool) -> None:
        super().__init__()
        self.side, self.classes = side, classes

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        grey = images.float().mean(dim=1, keepdim=True) / 255
        features = F.adaptive_avg_pool2d(grey, self.side).flatten(1)
        if not self.classes:
            return features
        corners = F.adaptive_avg_pool2d(grey, 2).flatten(1)[:, :3]
        return features, 8 * corners


class Corners(nn.Module):
    """A judge: the logits of `Pooled` for images in [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        corners: Tensor = F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)[:, :3]
        return 4 * corners


def pooled() -> nn.Module:
    return Pooled(2, classes=False)


def classifier() -> nn.Module:
    return Pooled(2, classes=True)


def wide() -> nn.Module:
    return Pooled(8, classes=False)


def corners() -> nn.Module:
    return Corners()


def few_classes() -> nn.Module:
    """A judge of two classes, for images of three channels."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


def frechet_by_scipy(real: Tensor, made: Tensor) -> float:
    """Of features n d, by a root of the product of the covariances."""
    from scipy.linalg import sqrtm

    x, y = real.double().numpy(), made.double().numpy()
    a, b = (torch.from_numpy(part).T.cov().numpy() for part in (x, y))
    away = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(away + a.trace() + b.trace() - 2 * sqrtm(a @ b).real.trace())
