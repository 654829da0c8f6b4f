"""Folders of images that commands read and write: which images there are, what their results are called."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.owned_folder import SHEET_NAME
from images.datasets import to_float
from images.listing import list_images


def image_names(source: Path) -> list[str]:
    """Image files below a folder, relative to it, or the one file that `source` is. Raises UserError."""
    if source.is_file():
        return [source.name]
    if not source.is_dir():
        raise UserError(f"there is no folder or file {source}; name a folder of images or an image file")
    names = [os.fsdecode(name) for name in list_images(source)]
    if not names:
        raise UserError(f"{source} holds no images; name a folder with image files in it, or in its subfolders")
    return names


def target_names(names: Sequence[str]) -> dict[str, str]:
    """The PNG file for each image: a.jpg becomes a.png, or a.jpg.png where a.png is taken, by another or our sheet."""
    short = {name: str(Path(name).with_suffix(".png")) for name in names}
    shared = Counter([*short.values(), SHEET_NAME, *(f"{name}.png" for name in names)])  # a.jpg.png may be an image too
    return {name: target if shared[target] == 1 else f"{name}.png" for name, target in short.items()}


class Targets:
    """As `target_names`, of a million images too: in a few bytes each."""

    def __init__(self, paths: np.ndarray) -> None:
        """paths: n, bytes."""
        self.paths = paths
        short = np.fromiter((hash_of(stem_of(name)) for name in self.names()), np.int64, len(paths))
        whole = np.fromiter((hash_of(name) for name in self.names()), np.int64, len(paths))
        taken = np.concatenate([short, whole, [hash_of(stem_of(SHEET_NAME))]])
        values, counts = np.unique(taken, return_counts=True)
        # Which keep their ending: without it another has the same name.
        self.long = counts[np.searchsorted(values, short)] > 1

    def names(self) -> Iterator[str]:
        return (os.fsdecode(path) for path in self.paths)

    def stem(self, number: int) -> str:
        """The name of an image's file without ".png"."""
        name = os.fsdecode(self.paths[number])
        return name if self.long[number] else stem_of(name)


def stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def hash_of(name: str) -> int:
    """63 bits: two names that share them by chance keep their endings, which does no harm."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") >> 1


def check_max_side(max_side: int | None) -> None:
    if max_side is not None and max_side < 1:
        raise UserError(f"max_side={max_side}, expected at least 1 pixel")


def scale_within(picture: Image.Image, max_side: int | None) -> Image.Image:
    """The picture scaled down, antialiased, to a longer side of `max_side`; as it is where that is None or enough."""
    if max_side is None or max(picture.size) <= max_side:
        return picture
    scale = max_side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def to_images(picture: Image.Image) -> Tensor:
    """An "L" or "RGB" picture as 1 c H W, float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture))
    return to_float(rearrange(pixels, "h w -> 1 1 h w" if pixels.ndim == 2 else "h w c -> 1 c h w"))
