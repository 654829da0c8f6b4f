"""Images with holes: scratches, occlusions, or whatever a mask beside a file says is missing. Missing pixels are nan.

A VAE with `model.holes` (Mattei and Frellsen 2019, arXiv:1812.02633, on images) reads zeros in their place and, in a
further channel, which pixels are seen; its likelihood counts the seen ones alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.errors import UserError, check_fields
from images.datasets import ImageDataset, extended, to_float
from images.files import MASK_ENDING, BadImageError, open_upright, read_size, scale_to_cover
from images.random_numbers import uniforms
from images.sources import FileSource
from training.task import Batch

Drawn = Literal["none", "half", "rectangle", "scratches", "pixels"]

MEAN_LENGTH = 0.52  # of a line between two points by chance, in sides of a square


@dataclass(frozen=True, kw_only=True)
class HolesConfig:
    """Which pixels of each image are missing. Held-out images have holes too; what is drawn is drawn once for each."""

    drawn: Drawn = "none"  # by chance: a half of the image, a rectangle, lines, or pixels one by one
    share: float = 0.5  # of the pixels, about, that are drawn; a half is a half
    files: bool = False  # photo.png has its mask in photo.mask.png beside it, white where pixels are missing
    seed: int = 0  # of the draws; apart from train.seed, so that runs see the same images

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("share", 0 < self.share < 1, "a share above 0, below 1"),
                ("share", self.drawn != "half" or self.share == 0.5, "0.5 with drawn=half"),
                ("seed", self.seed >= 0, "0 or more"),
            ],
        )

    @property
    def some(self) -> bool:
        return self.files or self.drawn != "none"


def drawn_holes(config: HolesConfig, numbers: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """b H W, True where a pixel of the image of such a number is missing."""
    if config.drawn == "pixels":
        return uniforms(config.seed, numbers, height * width).reshape(-1, height, width) < config.share
    holes = np.zeros((len(numbers), height, width), dtype=bool)
    if config.drawn == "half":
        for hole, side in zip(holes, (uniforms(config.seed, numbers, 1)[:, 0] * 4).astype(int), strict=True):
            rows = (slice(height // 2), slice(height // 2, None), slice(None), slice(None))[side]
            columns = (slice(None), slice(None), slice(width // 2), slice(width // 2, None))[side]
            hole[rows, columns] = True
    elif config.drawn == "rectangle":
        for hole, (form, top, left) in zip(holes, uniforms(config.seed, numbers, 3), strict=True):
            tall = min(height, max(1, round(height * config.share ** (0.3 + 0.4 * form))))
            wide = min(width, max(1, round(config.share * height * width / tall)))
            y, x = int(top * (height - tall + 1)), int(left * (width - wide + 1))
            hole[y : y + tall, x : x + wide] = True
    elif config.drawn == "scratches":
        thick = max(1.0, max(height, width) / 20)
        count = max(1, round(config.share * min(height, width) / (MEAN_LENGTH * thick)))
        rows, columns = np.mgrid[:height, :width]
        for hole, ends in zip(holes, uniforms(config.seed, numbers, 4 * count).reshape(-1, count, 4), strict=True):
            for y0, x0, y1, x1 in ends * np.array([height, width, height, width]):
                hole |= distance_to_line(rows + 0.5, columns + 0.5, (y0, x0), (y1, x1)) < thick / 2
    return holes


def distance_to_line(
    rows: NDArray[np.float64], columns: NDArray[np.float64], start: tuple[float, float], end: tuple[float, float]
) -> NDArray[np.float64]:
    """Of points from the part of a line between two others."""
    (y0, x0), (y1, x1) = start, end
    length = max((y1 - y0) ** 2 + (x1 - x0) ** 2, 1e-12)
    along = np.clip(((rows - y0) * (y1 - y0) + (columns - x0) * (x1 - x0)) / length, 0, 1)
    distance: NDArray[np.float64] = np.hypot(rows - y0 - along * (y1 - y0), columns - x0 - along * (x1 - x0))
    return distance


def mask_of_file(path: Path) -> Path:
    """photo.png -> photo.mask.png"""
    return path.with_name(f"{path.stem}{MASK_ENDING}")


def open_mask(picture: Path) -> Image.Image | None:
    """The mask of the image of a file, "L", of the image's size and white where pixels are missing; None where there is
    none. Raises UserError for one that cannot be read, or that has another size."""
    mask = mask_of_file(picture)
    if not mask.is_file():
        return None
    try:
        opened = open_upright(mask, 1)
    except BadImageError as error:
        raise UserError(
            f"{mask} cannot be read: {error}; save it anew as PNG, white where pixels are missing, or take it away if "
            f"nothing of {picture.name} is"
        ) from error
    if (opened.height, opened.width) != read_size(picture):
        height, width = read_size(picture)
        raise UserError(
            f"{mask} has {opened.width}x{opened.height} pixels and its image {width}x{height}, expected the same: "
            "paint it over the image itself"
        )
    return opened


def pictures_of(images: ImageDataset, indices: Sequence[int]) -> list[Path]:
    """The files of images. Raises UserError for images that are none."""
    source = images.source
    if not isinstance(source, FileSource):
        raise UserError(
            f"holes.files=true, but {source.title} is not a folder, expected image files with masks beside them"
        )
    return [Path(source.location(int(images.indices[index]))) for index in indices]


def holes_of_images(config: HolesConfig, images: ImageDataset, indices: Sequence[int]) -> list[NDArray[np.bool_]]:
    """h w of each image, scaled as its pixels are before they are cropped; or H W, where what is beyond its middle need
    not be said. Raises UserError."""
    H, W = images.shape_of(indices)
    drawn = list(drawn_holes(config, images.indices[list(indices)].tolist(), H, W))
    if not config.files:
        return images.beyond_the_middle(drawn, indices)
    masks = [open_mask(picture) for picture in pictures_of(images, indices)]
    holes = []
    for mask, hole, reaching in zip(masks, drawn, images.beyond_the_middle(drawn, indices), strict=True):
        if mask is None:
            holes.append(reaching)
            continue
        missing = np.asarray(scale_to_cover(mask, H, W)) > 127
        holes.append(extended(hole, missing.shape) | missing)
    return holes


def with_holes(
    batch: Batch, config: HolesConfig, images: ImageDataset, indices: Sequence[int], draws: Sequence[int]
) -> Batch:
    """A batch with "holes", b H W bool, of images `indices`, cropped, mirrored and shifted as the images of these draws
    are: a missing pixel is missing in all draws. Raises UserError for an image of which nothing is seen; of images that
    are augmented, in no draw at all."""
    whole = holes_of_images(config, images, indices)
    holes = np.empty((len(whole), *images.shape_of(indices)), dtype=bool)
    for row, window in enumerate(images.seen([hole[..., None] for hole in whole], indices, draws)):
        holes[row] = window[..., 0]
        if (holes[row] if images.augment_seed is None else whole[row]).all():
            raise UserError(of_nothing(config, images, indices[row]))
    return {**batch, "holes": torch.from_numpy(holes)}


def of_nothing(config: HolesConfig, images: ImageDataset, index: int) -> str:
    """What there is to say of an image of which nothing is seen."""
    location = Path(images.source.location(int(images.indices[index])))
    drawn = f"holes.drawn={config.drawn}, of a share of {config.share:g},"
    mask = mask_of_file(location)
    if not config.files or not mask.is_file():
        return f"{drawn} leaves nothing of {location}, expected some pixels to be seen: lower holes.share"
    beside = "" if config.drawn == "none" else f" with {drawn}"
    return (
        f"{mask}{beside} leaves nothing of the part of {location.name} that the model sees, expected some black: paint "
        "less of it white, or leave the image out"
    )


def seen_images(batch: Batch) -> Tensor:
    """The images of a batch, b c H W in [-1, 1], nan where pixels are missing."""
    images = to_float(batch["images"])
    if "holes" in batch:
        images = images.masked_fill(batch["holes"][:, None], math.nan)
    return images


def seen_pixels(images: Tensor) -> Tensor:
    """b c H W -> b 1 H W bool: a pixel is missing as soon as one of its channels is."""
    return images.isnan().logical_not().all(dim=1, keepdim=True)


def with_indicators(images: Tensor) -> Tensor:
    """b c H W with nan -> b (c + 1) H W: zeros in the place of missing pixels, and a channel that is 1 where they are
    seen and -1 where not."""
    seen = seen_pixels(images)
    return torch.cat([images.nan_to_num(0.0).where(seen, 0.0), torch.where(seen, 1.0, -1.0).to(images.dtype)], dim=1)
