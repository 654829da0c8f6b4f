"""What a demo makes of images by way of `.zlg` files, and how large they are beside those of other formats."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.wording import counted
from metrics.similarity import decibels
from pipelines.codec.archive import SUFFIX, open_archive
from pipelines.codec.codec import Codec
from pipelines.codec.lossless import LosslessCodec
from pipelines.codec.lossless_archive import is_lossless, open_lossless
from pipelines.demo.limits import Limits, check_bytes
from pipelines.demo.looking import pixels_of, psnr_in_words
from pipelines.image_folders import scale_within, to_images
from pipelines.image_input import fit
from pipelines.pictures import to_picture, to_pil

TITLE = "this file"  # in messages: its path is the server's


class Size(NamedTuple):
    what: str
    size: int  # bytes
    bits: float  # per pixel
    psnr: str


class Packed(NamedTuple):
    data: bytes  # of the .zlg file
    pictures: list[Image.Image]  # as they will be decompressed
    sizes: list[Size]
    notes: list[str]  # what a person should know


def compress(codec: Codec, picture: Image.Image, own_size: int | None) -> Packed:
    """One picture. own_size: in its own size, scaled down to this longer side; None: scaled and cropped to the
    model's. Raises UserError."""
    if own_size is None:
        spec = codec.autoencoder.code_spec()
        original = fit(picture, spec.image_height, spec.image_width)
    else:
        original = scale_within(picture, own_size)
    packed = codec.compress(to_images(original))
    decoded = to_pil(codec.decompress(packed.data)[0])
    pixels = original.width * original.height
    ours = Size(
        f"this {SUFFIX} file", len(packed.data), 8 * len(packed.data) / pixels, psnr_in_words(original, decoded)
    )
    return Packed(packed.data, [decoded], [ours, *others(original, decoded)], list(packed.notes))


def others(original: Image.Image, decoded: Image.Image) -> list[Size]:
    """PNG and WebP without loss, and the smallest WebP file that is as close to the original as what was decoded."""
    sizes = [size_of("PNG", original, "PNG", optimize=True)]
    sizes.append(size_of("WebP without loss", original, "WEBP", lossless=True, quality=100, method=6))
    wanted = decibels(np.asarray(original), np.asarray(decoded))
    low, high = 0, 100
    while wanted is not None and low < high:  # PSNR rises with the quality, some last hundredths aside
        quality = (low + high) // 2
        if closeness(original, quality) < wanted:
            low = quality + 1
        else:
            high = quality
    what = "WebP of that PSNR" if wanted is not None and closeness(original, high) >= wanted else "WebP at its best"
    return [*sizes, size_of(f"{what}, quality {high}", original, "WEBP", quality=high, method=6)]


def closeness(original: Image.Image, quality: int) -> float:
    """PSNR of a WebP file, in decibels."""
    with Image.open(io.BytesIO(encoded(original, "WEBP", quality=quality, method=6))) as read:
        found = decibels(np.asarray(original), np.asarray(read.convert(original.mode)))
    return float("inf") if found is None else found


def size_of(what: str, picture: Image.Image, kind: str, **options: object) -> Size:
    data = encoded(picture, kind, **options)
    with Image.open(io.BytesIO(data)) as read:
        psnr = psnr_in_words(picture, read.convert(picture.mode))
    return Size(what, len(data), 8 * len(data) / (picture.width * picture.height), psnr)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    """A file. Of black and white a PNG file has one bit a pixel."""
    if kind == "PNG" and picture.mode == "L" and not set(np.unique(np.asarray(picture))) - {0, 255}:
        picture = picture.convert("1", dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def compress_losslessly(codec: LosslessCodec, pictures: Sequence[Image.Image]) -> Packed:
    """Pictures as the model takes them. Raises UserError for others."""
    data = codec.compress(torch.stack([pixels_of(picture) for picture in pictures]))
    pixels = sum(picture.width * picture.height for picture in pictures)
    decoded = [to_pil(image) for image in codec.decompress(data)]
    alike = all(a.tobytes() == b.tobytes() for a, b in zip(decoded, pictures, strict=True))
    sizes = [Size(f"this {SUFFIX} file", len(data), 8 * len(data) / pixels, "equal" if alike else "other images")]
    formats: list[tuple[str, str, dict[str, object]]] = [
        ("PNG", "PNG", {"optimize": True}),
        ("WebP without loss", "WEBP", {"lossless": True, "quality": 100, "method": 6}),
    ]
    for what, kind, options in formats:
        size = sum(len(encoded(picture, kind, **options)) for picture in pictures)
        sizes.append(Size(f"{what}, {counted(len(pictures), 'file')}", size, 8 * size / pixels, "equal"))
    few = len(pictures) < 10
    notes = ["images of one file pay for each other's latents: with more of them each becomes smaller"] if few else []
    return Packed(data, decoded, sizes, notes)


class Unpacked(NamedTuple):
    pictures: list[Image.Image]
    names: list[str]
    line: str  # what the file holds


def decompress(codec: Codec | LosslessCodec, path: str | Path | None, limits: Limits) -> Unpacked:
    """Images of a file, as many as a request may ask for. Raises UserError."""
    if path is None:
        raise UserError(f"there is no file yet; upload a {SUFFIX} file that this model has written")
    check_bytes(path, limits)
    path = Path(path)
    lossless = isinstance(codec, LosslessCodec)
    if is_lossless(path) != lossless:
        kinds = ("with a loss, by an autoencoder", "without loss, by a VAE")
        raise UserError(
            f"this file was compressed {kinds[not lossless]}, expected one {kinds[lossless]}; it needs another model"
        )
    size = path.stat().st_size
    if isinstance(codec, LosslessCodec):
        with open_lossless(path, TITLE) as file:
            codec.check_file(file)
            names, count = list(file.names()), file.count
            numbers = range(max(0, count - limits.images), count)  # the last ones lie uppermost and are quick to read
            found = dict(codec.images(file, numbers))
        pictures = [to_picture(found[number]) for number in numbers]
    else:
        with open_archive(path, TITLE) as archive:
            names, count = list(archive.names()), archive.count
        numbers = range(min(count, limits.images))
        most = int(limits.megapixels * 1e6)
        images = codec.decompress(path, numbers, max_pixels=most, title=TITLE)
        pictures = [to_pil(image) for image in images]
    place = "last" if lossless else "first"
    shown = "" if count == len(numbers) else f", the {place} {len(numbers)} of which are shown"
    pixels = sum(picture.width * picture.height for picture in pictures)
    bits = f", {8 * size / pixels:.3f} bits per pixel" if count == len(numbers) else ""
    line = f"{counted(count, 'image')} in {counted(size, 'byte')}{bits}{shown}"
    return Unpacked(pictures, [names[number] or f"image {number}" for number in numbers], line)
