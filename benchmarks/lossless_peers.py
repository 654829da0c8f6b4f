"""What PNG and lossless WebP take for images: the bar for lossless files.

`python -m benchmarks.lossless_peers --data FOLDER_OR_NPZ --split test` prints bytes of all images, and bits per number
of them (pixel and channel): PNG optimised and WebP at its slowest, each image a file, and WebP of sheets of 100.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from images.sources import open_source

SHEET = 10  # images along each side of a sheet


def size(pixels: np.ndarray, **settings: object) -> int:
    """Bytes of h w c as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, **settings)  # type: ignore[arg-type]
    return len(file.getvalue())


def peer_bytes(images: np.ndarray) -> dict[str, int]:
    """uint8 n h w c; of sheets those that are not full have white places."""
    n, h, w, c = images.shape
    filled = np.concatenate([images, np.full((-n % SHEET**2, h, w, c), 255, np.uint8)])
    sheets = filled.reshape(-1, SHEET, SHEET, h, w, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, SHEET * h, SHEET * w, c)
    webp = {"format": "WEBP", "lossless": True, "quality": 100, "method": 6, "exact": True}
    return {
        "PNG, each a file": sum(size(image, format="PNG", optimize=True) for image in images),
        "WebP, each a file": sum(size(image, **webp) for image in images),
        f"WebP, sheets of {SHEET**2}": sum(size(sheet, **webp) for sheet in sheets),
    }


def read_images(data: str, split: str, count: int | None, channels: int) -> np.ndarray:
    """uint8 n h w c, of a source whose images all have the size of the first."""
    source = open_source(data, split, Path("data"))  # type: ignore[arg-type]
    height, width = source.sizes([0])[0]
    return np.stack([source.read(i, height, width, channels) for i in range(min(count or len(source), len(source)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of images, .npz file or a name of `data.path`")
    parser.add_argument("--split", default="train")
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--channels", type=int, default=1)
    options = parser.parse_args()
    images = read_images(options.data, options.split, options.count, options.channels)
    print(f"{len(images)} images of {images.shape[1:]}")
    print("| file | bytes | bits per number |\n|---|---|---|")
    for name, taken in peer_bytes(images).items():
        print(f"| {name} | {taken:,} | {8 * taken / images.size:.4f} |")


if __name__ == "__main__":
    main()
