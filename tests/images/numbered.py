"""Grey images that tell their number, in memory and as a folder of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from images.datasets import (
    DataConfig,
)
from images.sources import ArraySource


def numbered(count: int, height: int = 8, width: int = 8) -> ArraySource:
    """Grey images of which every pixel differs from its neighbours and tells its image."""
    images = np.arange(height * width, dtype=np.int64).reshape(1, height, width) * 3
    return ArraySource("numbered", ((images + 7 * np.arange(count)[:, None, None]) % 251).astype(np.uint8))


def save_folder(root: Path, per_class: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Classes a and b; image i of a class has the grey value i."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            Image.new("L", size, number).save(root / name / f"{number:03d}.png")
    return root


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"path": "somewhere", "image_size": 8, "channels": 1, **changes})
