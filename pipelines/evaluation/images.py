"""Which images are judged: test images at a model's size, in batches, and the hash that names the set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from common.errors import UserError
from images.datasets import DataConfig, ImageDataset, open_images
from images.files import MAX_BAD_SHARE
from images.sources import KINDS, NAMES, has_parts, is_there
from metrics.reference import hash_of, image_digests
from pipelines.evaluation.gathering import Values

CROP, FILTER = "center", "bicubic, antialiased (Pillow), to the smallest size that covers height x width"


@dataclass(frozen=True, kw_only=True)
class EvaluateDataConfig:
    """Which test images."""

    path: str | None = None  # a folder of images, an .npz file, tars, hf:NAME, or a name such as cifar10
    split: Literal["train", "test"] = "test"  # of an .npz file or a named set; a folder has no such parts
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be


def images_of_size(
    path: str, split: Literal["train", "test"], max_bad_share: float, size: tuple[int, int], channels: int
) -> ImageDataset:
    """The images at this height and width. Raises UserError."""
    config = DataConfig(
        path=path,
        split=split if has_parts(path) else "train",
        image_size=size,
        channels=1 if channels == 1 else 3,
        max_bad_share=max_bad_share,
    )
    return ImageDataset(open_images(config), config)


def with_classes_of(images: ImageDataset, known: Sequence[str] | None) -> ImageDataset:
    """The images, their classes numbered as a prior that knows these numbers them; -1 where it does not know them."""
    source = images.source
    if source.labels is not None:
        names = source.class_names or ()
        if known is None or not set(names) <= set(known):
            source.labels = np.full(len(source), -1)  # other classes than the prior's: any class
        else:
            source.labels = np.array([*(known.index(name) for name in names), -1])[source.labels]  # -1 stays -1
    return ImageDataset(source, images.config, bad_images=images.bad_images)


def evenly(count: int | None, among: int) -> list[int]:
    """`count` of the positions 0 to `among` - 1, evenly spread; all of them where it is None or more."""
    count = among if count is None else min(count, among)
    return [i * among // count for i in range(count)]


def in_batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def digests(images: Tensor) -> np.ndarray:
    """SHA-256 of each image, uint8 b c H W: b 32, uint8."""
    return np.stack([np.frombuffer(digest, dtype=np.uint8) for digest in image_digests(images)])


def hash_of_set(values: Values) -> str:
    """SHA-256 of images in their order, at the size at which they are judged, by the `digests` of each."""
    return hash_of([digest.tobytes() for digest in values["sha256"]])


def check_there(option: str, path: str) -> None:
    """Raises UserError for a path that is neither a named set nor there."""
    if not is_there(path):
        raise UserError(f"{option}={path} is neither {KINDS}, nor one of {', '.join(NAMES)}; check the path")


def check_some(values: Values, count: int, path: str) -> None:
    """Raises UserError where nothing could be read."""
    if not len(values.get("sha256", ())):
        raise UserError(f"none of the {count} images of {path} that were chosen can be read")
