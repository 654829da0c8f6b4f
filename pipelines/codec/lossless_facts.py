"""Figures of files without loss, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.wording import counted
from pipelines.codec.lossless_archive import ARITHMETIC, ImageShape, LosslessArchive


class Figures(NamedTuple):
    """Of all images of some files."""

    images: int
    numbers: int  # of pixels and channels
    pixels: int
    payload_bits: int  # of the stacks
    bound_bits: int
    first_images: int  # under which nothing lies
    first_bits: int  # that these did not get back

    @property
    def bound_bits_each(self) -> float:
        """Of a number, by the ELBO."""
        return self.bound_bits / self.numbers


def figures_of(archives: Sequence[LosslessArchive]) -> Figures:
    pairs = [(archive.shape, segment) for archive in archives for segment in archive.segments]
    return Figures(
        images=sum(segment.images for _, segment in pairs),
        numbers=sum(segment.images * shape.numbers for shape, segment in pairs),
        pixels=sum(segment.images * shape.height * shape.width for shape, segment in pairs),
        payload_bits=sum(8 * len(segment.chain.stack) for _, segment in pairs),
        bound_bits=sum(segment.bound_bits for _, segment in pairs),
        first_images=sum(segment.first_images for _, segment in pairs),
        first_bits=sum(segment.chain.first_bits for _, segment in pairs),
    )


def described(shape: ImageShape) -> str:
    colours = {1: "grey", 3: "colour"}.get(shape.channels, f"{shape.channels} channels")
    return f"{shape.height}x{shape.width} pixels in {colours}"


def lines_of(archives: Sequence[LosslessArchive], size: int) -> list[str]:
    """What a person is told. size: bytes of the files."""
    found = figures_of(archives)
    shapes = dict.fromkeys(described(archive.shape) for archive in archives)
    models = dict.fromkeys(archive.model.hex() for archive in archives)
    segments = sum(len(archive.segments) for archive in archives)
    share = found.first_bits / found.payload_bits
    return [
        "mode: lossless",
        f"{found.images} of {', '.join(shapes)}",
        f"bits per dimension: {8 * size / found.numbers:.4f} with names and checks, "
        f"{found.payload_bits / found.numbers:.4f} of the images alone, "
        f"{found.bound_bits_each:.4f} by the model's ELBO",
        f"first bits: nothing lies under {counted(found.first_images, 'image')} at the bottom of "
        f"{counted(segments, 'stack')}: {-(-found.first_bits // 8)} bytes were not got back ({share:.2%})",
        f"VAE: {', '.join(models)}, exact arithmetic {ARITHMETIC}",
    ]
