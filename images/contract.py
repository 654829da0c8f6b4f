"""What a source of images is: images by index, wherever they lie, with classes and captions where these are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from common.errors import UserError
from common.wording import counted
from images.files import JPEG_MARGIN, MAX_PIXELS, Crop


class SourceSettings(NamedTuple):
    """How a source is opened and read, beside its path."""

    max_pixels: int = MAX_PIXELS  # of an image, by its header: larger ones count as unreadable
    relist: bool = False  # look into folders, tars and tables anew, whatever is kept of an earlier look
    image_field: str | None = None  # of tars the image's ending, of tables its column; None: the one there is
    label_field: str | None = None  # of tables the column of classes; None: the one there is
    jpeg_margin: float = JPEG_MARGIN  # of JPEG files: see images.files.read_image


class ImageSource(Protocol):
    """Images by index, with or without classes."""

    title: str  # what the user named, for messages
    labels: np.ndarray | None  # n, int64, -1 where the class of an image is not known; None: there are no classes
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's file relative to the source's folder, or its number."""
        ...

    def location(self, index: int) -> str:
        """Where a person finds the image."""
        ...

    def read(self, index: int, height: int, width: int, channels: int, crop: Crop | None = None) -> np.ndarray:
        """Image `index`, scaled to the smallest size that covers height x width, or the part of it that `crop` says at
        just that size: uint8 h w c.

        Raises BadImageError; UserError where the source itself is gone, or has changed since it was opened.
        """
        ...

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Height and width of images, upright: b 2, int64; 0 0 where a file cannot be read."""
        ...

    def still_bad(self, location: str) -> bool:
        """Whether there is an image of this location that cannot be read."""
        ...

    def caption(self, index: int) -> str | None:
        """What the source says of an image in words; None where it says nothing."""
        ...

    def files(self, indices: Sequence[int]) -> list[Path]:
        """Files of this machine that hold these images; none where the fingerprint tells when images change."""
        ...

    def stored_size(self, index: int) -> int | None:
        """Bytes of the image as it lies there now; None where it is gone, or where the fingerprint tells of all."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over names and labels (and the pixels of arrays): equal for equal sets of images."""
        ...


def check_labels(
    title: str, count: int, labels: np.ndarray | None, class_names: Sequence[str] | None, *, lowest: int = 0
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels, `lowest` or more, as int64 with one name for each class, or None twice. Raises UserError."""
    if labels is None:
        return None, None
    labels = np.asarray(labels)
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iu":
        raise UserError(
            f"the labels of {title} are {labels.dtype} {labels.shape}, expected integers of shape ({count},)"
        )
    labels = labels.reshape(-1).astype(np.int64)
    names = tuple(map(str, range(labels.max() + 1)) if class_names is None else class_names)
    if labels.min() < lowest or labels.max() >= len(names):
        raise UserError(
            f"the labels of {title} go from {labels.min()} to {labels.max()}, "
            f"expected 0 to {len(names) - 1}: it has {counted(len(names), 'class', 'classes')}"
        )
    return labels, names
