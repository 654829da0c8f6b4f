"""What sources have in common whose images are encoded files within something larger: a tar, a column of a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from images.files import BadImageError, Crop, File, read_image, read_size


class EncodedImages(ABC):
    """Images that are decoded when asked for, each from a file of its own (`content`)."""

    max_pixels: int
    jpeg_margin: float

    @abstractmethod
    def content(self, index: int) -> File:
        """The image's file, or its bytes. Raises BadImageError where there is none."""

    def read(self, index: int, height: int, width: int, channels: int, crop: Crop | None = None) -> np.ndarray:
        """uint8 `height width channels`. Raises BadImageError."""
        return read_image(
            self.content(index),
            height,
            width,
            channels,
            crop=crop,
            max_pixels=self.max_pixels,
            jpeg_margin=self.jpeg_margin,
        )

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Heights and widths, `n 2`, zeros for what is no image."""
        return np.array([self.size(index) for index in indices], dtype=np.int64).reshape(-1, 2)

    def size(self, index: int) -> tuple[int, int]:
        try:
            return read_size(self.content(index), self.max_pixels)
        except BadImageError:
            return 0, 0
