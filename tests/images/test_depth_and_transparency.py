"""Values of more than eight bits, and transparent ones: white is what the file means by it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from images.files import BadImageError, flatten, read_image

LEVELS = np.arange(256).reshape(16, 16)


def tiff(
    rows: np.ndarray, bits: int, *, order: str = "<", sample_format: int = 1, white_is_zero: bool = False
) -> bytes:
    """A TIFF file of h w grey values, in one strip as they are: `rows` are of `bits`, but for 12."""
    data = pack_twelve_bits(rows) if bits == 12 else rows.astype(rows.dtype.newbyteorder(order)).tobytes()
    height, width = rows.shape
    tags = [  # number, type (3 short, 4 long), value; one of each
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8 + 2 + 10 * 12 + 4),  # where the pixels begin: behind header and tags
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    entries = (
        struct.pack(f"{order}HHL", number, kind, 1) + struct.pack(f"{order}{'H2x' if kind == 3 else 'L'}", value)
        for number, kind, value in tags
    )
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HL", 42, 8)
    return header + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4) + data


def pack_twelve_bits(rows: np.ndarray) -> bytes:
    """Two values of 12 bits in three bytes."""
    first, second = rows.reshape(-1, 2).astype(np.uint16).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


def png(rows: bytes, size: tuple[int, int], bits: int, colour: int, transparent: bytes) -> bytes:
    """A PNG file of one colour type (0 grey, 2 RGB), `rows` with their filter bytes, and a transparent value."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))

    header = struct.pack(">LLBBBBB", *size, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


DEEP_FILES = {  # each holds LEVELS, as its own format has them
    "16-bit.png": lambda: encoded(Image.fromarray(np.uint16(LEVELS * 257)), "PNG"),
    "16-bit.tif": lambda: tiff(np.uint16(LEVELS * 257), 16),
    "16-bit big-endian.tif": lambda: tiff(np.uint16(LEVELS * 257), 16, order=">"),
    "16-bit compressed.tif": lambda: encoded(Image.fromarray(np.uint16(LEVELS * 257)), "TIFF", compression="tiff_lzw"),
    "16-bit white is zero.tif": lambda: tiff(np.uint16((255 - LEVELS) * 257), 16, white_is_zero=True),
    "8-bit white is zero.tif": lambda: tiff(np.uint8(255 - LEVELS), 8, white_is_zero=True),
    "12-bit.tif": lambda: tiff(np.uint16(np.round(LEVELS * (4095 / 255))), 12),
    "16-bit.pgm": lambda: b"P5 16 16 65535\n" + (LEVELS * 257).astype(">u2").tobytes(),
    "10-bit.pgm": lambda: b"P5 16 16 1020\n" + (LEVELS * 4).astype(">u2").tobytes(),
    "plain text.pgm": lambda: b"P2 16 16 510\n" + " ".join(map(str, (LEVELS * 2).ravel())).encode(),
    "32-bit labels.tif": lambda: tiff(np.int32(LEVELS), 32, sample_format=2),
    "32-bit labels, unsigned.tif": lambda: tiff(np.uint32(LEVELS), 32),
    "32-bit labels, big-endian.tif": lambda: tiff(np.int32(LEVELS), 32, order=">", sample_format=2),
    "16-bit labels, signed.tif": lambda: tiff(np.int16(LEVELS), 16, sample_format=2),
    "32-bit labels, compressed.tif": lambda: encoded(
        Image.fromarray(np.int32(LEVELS)), "TIFF", compression="tiff_adobe_deflate"
    ),
}


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", DEEP_FILES)
def test_more_than_eight_bits_become_eight_by_what_is_white_in_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DEEP_FILES[name]())
    assert np.array_equal(read_image(tmp_path / name, 16, 16, 1)[:, :, 0], LEVELS)
    assert np.array_equal(read_image(tmp_path / name, 16, 16, 3), np.repeat(LEVELS[:, :, None], 3, axis=2))


def test_what_is_white_does_not_depend_on_the_values(tmp_path: Path) -> None:
    """A dark picture of 16 bits stays dark, though its values would do for labels."""
    dark = np.full((16, 16), 200, dtype=np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    (tmp_path / "dark.tif").write_bytes(tiff(dark, 16))
    (tmp_path / "dark.pgm").write_bytes(b"P5 16 16 65535\n" + dark.astype(">u2").tobytes())
    for name in ("dark.png", "dark.tif", "dark.pgm"):
        assert (read_image(tmp_path / name, 16, 16, 1) == 1).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.int32([[0, 256]]), 32, sample_format=2), "pixel values from 0 to 256, signed or 32-bit integers"),
        (tiff(np.uint32([[0, 2**32 - 1]]), 32), "pixel values from -1 to 0, signed or 32-bit integers"),
        (tiff(np.int16([[-1024, 3071]]), 16, sample_format=2), "pixel values from -1024 to 3071, signed or 32-bit"),
        (tiff(np.float32([[0, 1]]), 32, sample_format=3), "floating-point pixels"),
        (tiff(np.float32([[0, 1]]), 32, order=">", sample_format=3), "floating-point pixels"),
    ],
)
def test_values_without_an_agreed_white_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "deep.tif").write_bytes(content)
    with pytest.raises(BadImageError, match=reason):
        read_image(tmp_path / "deep.tif", 1, 2, 1)


@pytest.mark.parametrize(
    ("rows", "bits", "colour", "transparent", "expected"),
    [
        (bytes([0, 0b01000000]), 1, 0, [1], [0, 255]),
        (bytes([0, 0b00010000]), 2, 0, [0], [255, 85]),
        (bytes([0, 0b01100000]), 2, 0, [1], [255, 170]),
        (bytes([0, 0x12]), 4, 0, [1], [255, 34]),
        (bytes([0, 7, 8]), 8, 0, [7], [255, 8]),
        (bytes([0]) + struct.pack(">2H", 257, 514), 16, 0, [257], [255, 2]),
        (bytes([0]) + struct.pack(">6H", *[0x1234] * 3, *[0x3434] * 3), 16, 2, [0x1234] * 3, [255, 0x34]),
    ],
)
def test_a_png_s_transparent_value_is_white_at_every_depth(
    tmp_path: Path, rows: bytes, bits: int, colour: int, transparent: list[int], expected: list[int]
) -> None:
    content = png(rows, (2, 1), bits, colour, struct.pack(f">{len(transparent)}H", *transparent))
    (tmp_path / "keyed.png").write_bytes(content)
    assert read_image(tmp_path / "keyed.png", 1, 2, 1)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_transparency_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (1, 1), (100, 100, 100, 128))
    image = image.convert("LA").convert("La") if mode == "La" else image.convert("RGBa")
    assert flatten(image, 1).getpixel((0, 0)) == pytest.approx(255 - 155 * 128 / 255, abs=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))  # transparent black: what is hidden must not show
    image.paste((0, 0, 0, 128), (0, 0, 2, 4))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 200, 10, 10])
        image.info["transparency"] = 0
    elif mode == "LA":
        image = image.convert("LA")
    path = tmp_path / "clear.png"
    image.save(path)
    pixels = read_image(path, 4, 4, 3)
    assert (pixels[:, 2:] == 255).all()
    assert (pixels[:, :2] == (255 if mode == "P" else 127)).all()
