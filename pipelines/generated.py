"""Images that a pipeline has made, with their codes and classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from codes.spec import Codes
from common.errors import UserError
from pipelines.pictures import contact_sheet, in_columns, save_png, to_pil
from pipelines.streaming import gathered

SHOWN, COLUMNS = 64, 8  # images on the sheet of a notebook


class Generated(NamedTuple):
    images: Tensor  # b c H W, float32 in [-1, 1]
    codes: Codes  # one b h w per grid, int64
    labels: Tensor | None  # b, int64; None for a prior without classes

    def __repr__(self) -> str:
        codes = " + ".join("x".join(map(str, grid.shape[1:])) for grid in self.codes)
        labels = "" if self.labels is None else f", labels {some_of(self.labels.tolist())}"
        return f"Generated({images_in_words(self.images)}, {codes} codes{labels})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the first images."""
        return sheet_png(self.images)

    def pil(self) -> list[Image.Image]:
        """The images as PIL pictures, of mode "L" or "RGB"."""
        return [to_pil(image) for image in self.images]

    def save(self, folder: str | Path, *, first_index: int = 0) -> list[Path]:
        """Writes 000000.png, 000001.png ... into a folder, which may hold other files, and returns their paths.
        first_index: number of the first file, as of a later batch of a stream. Raises UserError, before anything is
        written, where one of them is there already."""
        return save_numbered(self.pil(), folder, first_index)


def together(batches: Iterable[Generated], num: int) -> Generated:
    """What the batches of a stream of `num` images hold, in order, on the CPU (`streaming.gathered`)."""
    labelled = False

    def tensors() -> Iterator[list[Tensor]]:
        nonlocal labelled
        for images, codes, labels in batches:
            labelled = labels is not None
            yield [images, *codes, *([] if labels is None else [labels])]
            del images, codes, labels

    images, *others = gathered(tensors(), num)
    return Generated(images, tuple(others[:-1] if labelled else others), others[-1] if labelled else None)


def save_numbered(pictures: Sequence[Image.Image], folder: str | Path, first_index: int) -> list[Path]:
    """As `Generated.save`."""
    paths = [Path(folder).expanduser() / f"{first_index + i:06d}.png" for i in range(len(pictures))]
    if (there := next((path for path in paths if path.exists()), None)) is not None:
        raise UserError(f"{there} is there already and is not replaced; name another folder, or delete it first")
    for picture, path in zip(pictures, paths, strict=True):
        save_png(picture, path)
    return paths


def sheet_png(images: Tensor) -> bytes:
    """The first images, b c H W in [-1, 1], on one sheet, as the bytes of a PNG file."""
    data = BytesIO()
    contact_sheet(in_columns([to_pil(image) for image in images[:SHOWN]], COLUMNS)).save(data, format="PNG")
    return data.getvalue()


def images_in_words(images: Tensor) -> str:
    """`3 images of 1x28x28 on cpu`"""
    count, size = len(images), "x".join(map(str, images.shape[1:]))
    return f"{count} {'image' if count == 1 else 'images'} of {size} on {images.device}"


def some_of(values: Sequence[int], most: int = 8) -> str:
    """`[3, 1, 4]`, or the first of many: `[0, 1, 2, 3, 4, 5, 6, 7, ...]`"""
    return f"[{', '.join(map(str, values[:most]))}{', ...' if len(values) > most else ''}]"
