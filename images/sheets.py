"""Sheets of pictures for people: tensors to PIL and back, rows of small pictures on one page, named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from images.datasets import to_float, to_uint8

LEGIBLE = 56  # pixels: images with a shorter side are magnified on sheets
TITLE_SIZE = 14  # pixels, of what stands above a picture


def to_pil(image: Tensor) -> Image.Image:
    """One image, c H W float in [-1, 1], c = 1 or 3, as a PIL image of mode "L" or "RGB"."""
    return of_bands(to_uint8(image).cpu().numpy())


def to_pils(images: Tensor) -> list[Image.Image]:
    """Images, b c H W float in [-1, 1], as `to_pil` makes them, all by one copy from their device."""
    return [of_bands(bands) for bands in to_uint8(images).cpu().numpy()]


def of_bands(bands: np.ndarray) -> Image.Image:
    """uint8 c H W, c = 1 or 3. Pillow puts bands together several times as fast as an array's axes are exchanged."""
    pictures = [Image.fromarray(band) for band in bands]
    return pictures[0] if len(pictures) == 1 else Image.merge("RGB", pictures)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """uint8 H W c, c = 1 or 3, as a PIL image of mode "L" or "RGB"."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_tensor(picture: Image.Image) -> Tensor:
    """A PIL image of mode "RGB" as 3 H W, float32 in [-1, 1]."""
    return to_float(rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w"))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_names: Sequence[str] | None = None,
    titles: Sequence[Sequence[str]] | None = None,
    legible: int = LEGIBLE,
) -> Image.Image:
    """Rows of pictures on one page, each picture in the middle of a cell as large as the largest.

    Those with a side shorter than `legible` pixels are magnified by a whole number, pixel by pixel, so that a person
    sees them. `row_names` stand at the left of their rows; `titles` above their pictures, those of a row that has none
    being empty, and are cut where they are wider.
    """
    width = max(picture.width for row in rows for picture in row)
    height = max(picture.height for row in rows for picture in row)
    zoom = max(1, math.ceil(legible / min(width, height)))
    gap, columns = 2 * zoom, max(len(row) for row in rows)
    font = ImageFont.load_default(max(12, min(height * zoom // 4, 24)))
    title_font = ImageFont.load_default(TITLE_SIZE)
    margin = gap if row_names is None else 2 * gap + math.ceil(max(font.getlength(name) for name in row_names))
    cell_width, cell_height = width * zoom + gap, height * zoom + gap
    heights = [0 if titles is None or not titles[r] else TITLE_SIZE + gap for r in range(len(rows))]  # of the titles
    size = (margin + columns * cell_width, gap + len(rows) * cell_height + sum(heights))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = gap + r * cell_height + sum(heights[: r + 1])
        for column, picture in enumerate(row):
            shown = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
            left = margin + column * cell_width
            sheet.paste(shown, (left + (width * zoom - shown.width) // 2, top + (height * zoom - shown.height) // 2))
            if heights[r] and titles is not None:
                title, middle = cut_to(titles[r][column], title_font, width * zoom), left + width * zoom // 2
                draw.text((middle, top - gap // 2), title, fill="black", font=title_font, anchor="ms")
        if row_names is not None:
            draw.text((gap, top + height * zoom // 2), row_names[r], fill="black", font=font, anchor="lm")
    return sheet


def cut_to(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of its beginning as is `width` pixels wide, with a mark that it goes on."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
