"""Pictures on a page: pixel for pixel as a model made them, magnified by the browser, and small enough together."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from images.sheets import to_pil

LIMIT = 8_500_000  # characters of all pictures of a page together; the page stays below 10 MB
SMALL = 256 * 256  # pixels: pictures up to this size are PNG, without loss
LARGEST_SIDE = 256  # pixels: larger images are scaled down for the page
GAP = 1  # pixels between the images of a strip


@dataclass(eq=False)
class Picture:
    image: Image.Image
    alt: str  # what it shows, in words
    zoom: int = 1  # how many times as large it is shown, pixel by pixel

    @property
    def width(self) -> int:
        return self.image.width * self.zoom

    @property
    def height(self) -> int:
        return self.image.height * self.zoom


class Level(NamedTuple):
    """One way to make all pictures of a page smaller."""

    quality: int | None  # of WebP; None: small pictures are PNG, others WebP of 92
    halved: int  # how often the sides are halved
    said: str


LEVELS = [Level(None, 0, ""), Level(92, 0, "pictures are compressed with loss"), Level(70, 0, "pictures are coarse")]
LEVELS += [Level(70, times, f"pictures are coarse, at 1/{2**times} of their size") for times in range(1, 6)]


def sources_of(pictures: Sequence[Picture]) -> tuple[dict[Picture, str], str]:
    """Data URIs, by picture, all in the first of `LEVELS` in which they are at most `LIMIT` long; and what is to be
    said of that level."""
    for level in LEVELS:
        sources: dict[Picture, str] = {}
        total = 0
        for picture in pictures:
            sources[picture] = encoded(picture.image, level)
            total += len(sources[picture])
            if total > LIMIT and level is not LEVELS[-1]:
                break
        else:
            break
    return sources, level.said


def encoded(image: Image.Image, level: Level) -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    if level.halved:
        size = tuple(max(1, side >> level.halved) for side in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.BOX)
    if level.quality is None and image.width * image.height <= SMALL:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, format="WEBP", quality=level.quality or 92, method=2)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def zoom_to(side: int, wanted: int) -> int:
    """How many times a picture of this many pixels is magnified to come near `wanted` pixels."""
    return max(1, round(wanted / side))


def shown(image: Tensor | Image.Image) -> Image.Image:
    """An image for the page, c H W in [-1, 1] or PIL: scaled down where it is larger than `LARGEST_SIDE`."""
    picture = image if isinstance(image, Image.Image) else to_pil(image)
    if max(picture.size) > LARGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    return picture


def strip(images: Iterable[Image.Image]) -> Image.Image:
    """Images of one size in a row, with a gap through which the page is seen."""
    row = list(images)
    width, height = row[0].size
    grey = row[0].mode == "L"
    gap = GAP * max(1, height // 64)
    sheet = Image.new("LA" if grey else "RGBA", (len(row) * (width + gap) - gap, height))
    for place, image in enumerate(row):
        sheet.paste(image.convert(sheet.mode), (place * (width + gap), 0))
    return sheet


HEAT = np.array(  # from black over red to pale yellow: dark to bright for all eyes
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], dtype=np.float64
)


def heat(values: np.ndarray) -> Image.Image:
    """Numbers h w, 0 black to 1 pale yellow, as a picture."""
    place = np.clip(np.nan_to_num(values, nan=0.0), 0, 1) * (len(HEAT) - 1)
    below = np.minimum(place.astype(int), len(HEAT) - 2)
    share = (place - below)[..., None]
    return Image.fromarray((HEAT[below] * (1 - share) + HEAT[below + 1] * share).round().astype(np.uint8))
