"""What a training takes down of its images, and where its folder may lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from common.errors import UserError
from images.datasets import DataConfig, ImageDataset
from images.sources import NAMES, ArraySource

SIZES = 1000  # files whose sizes tell one set of images from another of the same names


def fingerprint_of(images: ImageDataset) -> str:
    """Of a part of a source, wherever that lies: its images' names, classes and, of a sample of them, files' sizes; of
    arrays every pixel. So a million files are not read, and what has been scaled or saved anew is still known."""
    digest = hashlib.sha256(images.fingerprint().encode())
    if not isinstance(images.source, ArraySource):
        count = len(images)
        for index in (i * count // SIZES for i in range(SIZES)) if count > SIZES else range(count):
            digest.update(f"{images.source.stored_size(int(images.indices[index]))} ".encode())
    return digest.hexdigest()


def check_apart(data: DataConfig, run: Path) -> None:
    """Raises UserError for a run inside a folder of its images, which its previews would change."""
    for path in (data.path, data.validation_path):
        folder = Path(path or "").expanduser().resolve()
        if path and path not in NAMES and folder.is_dir() and folder in (run.resolve(), *run.resolve().parents):
            raise UserError(
                f"the run folder {run} lies in the folder of the images, {path}, where its previews would be taken for "
                "images; name another --run folder, or the images' own subfolder"
            )
