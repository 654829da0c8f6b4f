"""Random parts of images, scaled to one size, as in Inception's training (Szegedy et al. 2015, arXiv:1409.4842)."""

from __future__ import annotations

import math

import numpy as np

from images.files import Crop

Part = tuple[float, float, float, float]
"""Top, left, height and width, in pixels of an upright image."""


def part_of_draw(
    chance: np.ndarray, shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
    """The part that a draw sees of an image, as torchvision's `RandomResizedCrop` chooses it.

    chance: tries 4, numbers in [0, 1): of area, proportions, top and left. scale: share of the image's area; ratio:
    width by height, in proportion to that of `shape`, to which the part is scaled (of a square: torchvision's own). The
    first try that fits into the image counts; where none does, the largest part in the middle whose proportions are
    allowed.
    """
    target = shape[1] / shape[0]
    narrowest, widest = (target * limit for limit in ratio)

    def part(height: int, width: int) -> Part:
        for area_chance, ratio_chance, top, left in chance:
            area = height * width * (scale[0] + area_chance * (scale[1] - scale[0]))
            proportion = math.exp(math.log(narrowest) + ratio_chance * (math.log(widest) - math.log(narrowest)))
            part_width, part_height = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
            if 0 < part_width <= width and 0 < part_height <= height:
                y, x = int(top * (height - part_height + 1)), int(left * (width - part_width + 1))
                return y, x, part_height, part_width
        if width / height < narrowest:
            part_height, part_width = max(1, min(height, round(width / narrowest))), width
        elif width / height > widest:
            part_height, part_width = height, max(1, min(width, round(height * widest)))
        else:
            part_height, part_width = height, width
        return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width

    return part


def seen_part(plane: np.ndarray, size: tuple[int, int], part: Part, shape: tuple[int, int]) -> np.ndarray:
    """The part of a plane h w c that moves with the pixels of an image, H W c, each value from the nearest pixel. size:
    height and width of the image in which the part is told."""
    top, left, height, width = part
    rows = ((top + (np.arange(shape[0]) + 0.5) * height / shape[0]) * plane.shape[0] / size[0]).astype(int)
    columns = ((left + (np.arange(shape[1]) + 0.5) * width / shape[1]) * plane.shape[1] / size[1]).astype(int)
    return plane[np.minimum(rows, plane.shape[0] - 1)[:, None], np.minimum(columns, plane.shape[1] - 1)]
