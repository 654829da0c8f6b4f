"""Decoding: every mode and orientation gives the picture a person sees, and what is no picture says so."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, features

from common.errors import UserError
from images import files as image_files
from images.files import BadImageError, BadImages, flatten, list_images, open_upright, read_image, read_size


def four_colours() -> np.ndarray:
    """A 6x8 picture whose quarters are red, green, blue and white: no two of its eight orientations are alike."""
    picture = np.zeros((6, 8, 3), dtype=np.uint8)
    picture[:3, :4], picture[:3, 4:] = (255, 0, 0), (0, 255, 0)
    picture[3:, :4], picture[3:, 4:] = (0, 0, 255), (255, 255, 255)
    return picture


def read(path: Path, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    return read_image(path, height, width, channels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "RGBX"])
def test_colour_modes_keep_their_colours(mode: str) -> None:
    image = Image.fromarray(four_colours())
    image = image.convert("P", palette=Image.Palette.ADAPTIVE) if mode[0] == "P" else image.convert(mode)
    if mode == "PA":
        image = image.convert("PA")
    assert image.mode == mode
    flat = np.asarray(flatten(image, 3)).astype(int)
    assert np.abs(flat - four_colours()).max() <= 2  # YCbCr rounds


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *((".png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *((".tif", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")),
        pytest.param(
            ".tif",
            "YCbCr",
            marks=pytest.mark.skipif(
                int(PIL.__version__.split(".")[0]) == 12, reason="pillow 12 cannot read what it wrote itself"
            ),
        ),
        *((".gif", mode) for mode in ("L", "P", "RGB")),
        *((".bmp", mode) for mode in ("1", "L", "P", "RGB")),
        *((".webp", mode) for mode in ("RGB", "RGBA")),
        *((".tga", mode) for mode in ("L", "LA", "RGB", "RGBA")),
        *((".ppm", mode) for mode in ("RGB",)),
        *((".pgm", mode) for mode in ("L", "I;16")),
        *((".pbm", mode) for mode in ("1",)),
        *((".jpg", mode) for mode in ("L", "RGB", "CMYK")),
        *((".jp2", mode) for mode in ("L", "LA", "RGB", "RGBA")),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_and_mode_is_read(tmp_path: Path, suffix: str, mode: str, channels: int) -> None:
    if suffix == ".jp2" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    halves = np.zeros((16, 16), dtype=np.uint8)
    halves[:, 8:] = 255  # left black, right white, in every mode
    sixteen_bits = Image.fromarray(halves.astype(np.uint16) * 257)
    image = sixteen_bits if mode == "I;16" else Image.fromarray(halves).convert(mode)
    path = tmp_path / f"image{suffix}"
    image.save(path, **({"lossless": True} if suffix == ".webp" else {}))
    assert list_images(tmp_path).tolist() == [path.name.encode()]
    pixels = read_image(path, 16, 16, channels)
    assert pixels.shape == (16, 16, channels)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - halves[:, :, None]).max() <= 3  # JPEG


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.fromarray(four_colours()).resize((80, 60), Image.Resampling.NEAREST)
    turns = {  # what the camera did to the upright picture, by the EXIF standard's table
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    sampling = {"subsampling": 0} if suffix == ".jpg" else {}
    turns[orientation].save(path, exif=exif, quality=100, **sampling)
    pixels = read_image(path, 60, 80, 3).astype(int)
    assert pixels.shape == (60, 80, 3)
    assert read_size(path) == (60, 80)
    corners = pixels[[10, 10, 50, 50], [10, 70, 10, 70]]
    assert np.abs(corners - [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]).max() <= 8


def exif_entries(*entries: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """An EXIF block of tags (number, type, count, value or place), little-endian, with `data` behind them."""
    table = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"Exif\0\0II" + struct.pack("<HLH", 42, 8, len(entries)) + table + bytes(4) + data


TURNED = (0x0112, 3, 1, 6)  # the tag of a picture that lies on its side


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"Exif\0\0garbage!", False),
        (exif_entries(TURNED)[:20], False),  # cut within the first tag
        (exif_entries(TURNED, (0x0132, 2, 20, 9999)), True),  # the date lies outside
        # What Pillow cannot write back, as it does once the picture is turned: a resolution of -2**31 / 0, of nan,
        # and of text.
        (exif_entries(TURNED, (0x011A, 10, 1, 38), data=struct.pack("<ll", -(2**31), 0)), True),
        (exif_entries(TURNED, (0x011A, 11, 1, 0x7FC00000)), True),
        (exif_entries(TURNED, (0x011A, 2, 4, 0x414141)), True),
    ],
    ids=["garbage", "cut", "outside", "zero denominator", "nan", "text"],
)
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path, suffix: str, exif: bytes, turned: bool) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.new("L", (32, 16)).save(path, exif=exif)
    assert read_size(path) == ((32, 16) if turned else (16, 32))
    assert open_upright(path, 1).size == ((16, 32) if turned else (32, 16))


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
    pixels = read(path, 4, 4)
    assert (pixels[:, 2:] == 255).all()
    assert (pixels[:, :2] == (255 if mode == "P" else 127)).all()


def test_scaling_covers_the_target_and_keeps_proportions(tmp_path: Path) -> None:
    Image.fromarray(four_colours()).resize((80, 60)).save(tmp_path / "image.png")
    for target, expected in [
        ((30, 30), (30, 40)),
        ((15, 40), (30, 40)),
        ((30, 10), (30, 40)),
        ((120, 120), (120, 160)),
        ((7, 9), (7, 9)),
    ]:
        height, width, _ = read(tmp_path / "image.png", *target).shape
        assert (height, width) == expected
    thin = Image.new("RGB", (1000, 1))
    thin.save(tmp_path / "thin.png")
    assert read(tmp_path / "thin.png", 2, 2).shape == (2, 2000, 3)


def test_reducing_is_antialiased(tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255  # without antialiasing a grey of 127 becomes black or white
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    pixels = read_image(tmp_path / "board.png", 8, 8, 1).astype(int)
    assert np.abs(pixels - 127).max() < 16


def test_large_jpegs_look_alike_with_and_without_the_decoder_s_own_reduction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, x = np.mgrid[0:512, 0:768]
    waves = np.stack([np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)], axis=-1)
    Image.fromarray(np.uint8(127.5 + 127.5 * waves)).save(tmp_path / "waves.jpg", quality=95)
    reduced = read(tmp_path / "waves.jpg", 64, 64)
    assert reduced.shape == (64, 96, 3)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *arguments: None)
    exact = read(tmp_path / "waves.jpg", 64, 64)
    difference = np.abs(reduced.astype(int) - exact)
    assert 0 < difference.max() <= 6  # 0 would mean that the reduction is not used at all


def write_bad_files(folder: Path) -> list[Path]:
    good = folder / "good.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good)
    Image.fromarray(noise).save(folder / "whole.jpg")
    files = {
        "empty.png": b"",
        "text.jpg": b"this is not an image",
        "truncated.png": good.read_bytes()[:5000],
        "truncated.jpg": (folder / "whole.jpg").read_bytes()[:1500],
        "header_only.gif": b"GIF89a",
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "page.jpg": b"\n<!DOCTYPE html><html>404</html>",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((4, 4), 10**6, dtype=np.int32)).save(folder / "deep.tif")
    (folder / "absent.png").symlink_to(folder / "nowhere.png")
    return [folder / name for name in (*files, "float.tif", "deep.tif", "absent.png")]


def test_files_that_are_no_images_say_why(tmp_path: Path) -> None:
    reasons = {}
    for path in write_bad_files(tmp_path):
        with pytest.raises(BadImageError) as caught:
            read(path)
        reasons[path.name] = str(caught.value)
    assert reasons["empty.png"] == "no image in a format that is known, or a damaged one"
    assert reasons["pointer.jpg"].startswith("is a Git LFS pointer, not the file itself: run `git lfs pull` ")
    assert reasons["page.jpg"].startswith("is a web page, not the file itself: ")
    assert "truncated" in reasons["truncated.png"]
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["float.tif"] == "floating-point pixels, expected 8 or 16 bits per channel"
    assert reasons["deep.tif"].startswith("pixel values from 1000000 to 1000000, signed or 32-bit integers, expected")
    assert "FileNotFoundError" in reasons["absent.png"]
    assert not any("\n" in reason for reason in reasons.values())


def test_a_decompression_bomb_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImageError, match="decompression bomb"):
        read(tmp_path / "bomb.png")


def test_listing_is_sorted_recursive_and_follows_links_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    elsewhere = tmp_path / "elsewhere"
    for path in (
        root / "b/2.PNG",
        root / "b/1.jpeg",
        root / "a/deep/3.webp",
        root / "0.tif",
        elsewhere / "x.png",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for ignored in (root / "notes.txt", root / ".hidden.png", root / ".git/4.png", root / "b/._1.jpeg"):
        ignored.parent.mkdir(exist_ok=True)
        ignored.touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "a/loop").symlink_to(root)
    assert list_images(root).tolist() == [
        b"0.tif",
        b"a/deep/3.webp",
        b"b/1.jpeg",
        b"b/2.PNG",
        b"linked/x.png",
    ]


def test_what_systems_scatter_about_is_not_listed(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "cat/@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "@eaDir/b.jpg", "__MACOSX/cat/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path).tolist() == [b"cat/a.jpg"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(folder: str) -> Any:
        if folder.endswith("lost+found"):  # as root, who runs tests in containers, may read all
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        UserError, match=r"no permission to read the folder .*lost\+found, .*: change its owner, or name"
    ):
        list_images(tmp_path)


def test_a_line_of_pixels_does_not_take_all_memory(tmp_path: Path) -> None:
    """1x30000 pixels to cover 256x256 are 2 thousand million."""
    Image.new("L", (30000, 1)).save(tmp_path / "line.png")
    with pytest.raises(BadImageError, match="1x30000 pixels, of which 256x256 would be cut out of 256x7680000"):
        read_image(tmp_path / "line.png", 256, 256, 3)
    assert read_image(tmp_path / "line.png", 1, 1, 3).shape == (1, 30000, 3)
    Image.new("L", (500, 1)).save(tmp_path / "bar.png")
    assert read_image(tmp_path / "bar.png", 256, 256, 1).shape == (256, 128000, 1)


def test_names_that_are_not_text_are_listed_and_read(tmp_path: Path) -> None:
    name = b"caf\xe9.png"  # Latin-1, as old archives have it
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    try:
        os.rename(tmp_path / "plain.png", os.path.join(os.fsencode(tmp_path), name))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert list_images(tmp_path).tolist() == [name]
    assert read(tmp_path / os.fsdecode(name), 4, 4).shape == (4, 4, 3)


def test_bad_images_are_recorded_once_by_whoever_finds_them(tmp_path: Path) -> None:
    record = tmp_path / "run" / "bad_files.txt"
    one, other = BadImages(1000, record), BadImages(1000, record)
    one.add("a.png", "empty")
    other.add("a.png", "empty")
    other.add("b.png", "torn")
    one.add("b.png", "torn")
    assert record.read_text() == "a.png\tempty\nb.png\ttorn\n"


def add_bad(bad_images: BadImages, count: int) -> None:
    for number in range(count):
        bad_images.add(f"{number}.png", "empty")


def test_more_bad_images_than_may_be_are_an_error_that_lists_them(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    names = [tmp_path / f"{number}.png" for number in range(6)]
    for name in names:
        name.touch()
    for name in names[:5]:
        BadImages(309, record).add(str(name), "empty")  # as five loader processes
    with pytest.raises(UserError) as caught:
        BadImages(309, record).add(str(names[5]), "torn")
    message = str(caught.value)
    assert message.startswith(f"6 of 309 images cannot be read, and 5 may be: {names[0]} (empty), ")
    assert f"{names[4]} (empty) and 1 more; repair or remove them and run the same command again, " in message
    assert f"or let more pass with --data.max_bad_share 0.04; all are listed in {record}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("images", "max_share", "allowed"),
    [
        (309, 0.01, 5),  # a few of a small set
        (50, 0.01, 5),
        (49, 0.01, 4),  # but at most a tenth
        (9, 0.01, 0),
        (700, 0.01, 7),
        (1_281_167, 0.01, 12_811),
        (309, 0.1, 30),
        (9, 0.5, 4),
        (309, 0.0, 0),  # none is none
        (10, 1.0, 10),
    ],
)
def test_how_many_images_may_be_bad(images: int, max_share: float, allowed: int) -> None:
    bad_images = BadImages(images, max_share=max_share, option="--share")
    add_bad(bad_images, allowed)
    assert len(bad_images.seen) == allowed
    if allowed < images:
        with pytest.raises(UserError, match=f"{allowed + 1} of {images} images .*, and {allowed} may be: .*--share "):
            bad_images.add("one more.png", "empty")


def test_the_share_that_the_message_names_lets_the_set_pass() -> None:
    with pytest.raises(UserError) as caught:
        add_bad(BadImages(309), 6)
    share = float(str(caught.value).split("--data.max_bad_share ")[1])
    add_bad(BadImages(309, max_share=share), 6)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_from_nothing_to_all(share: float) -> None:
    with pytest.raises(UserError, match=r"--data.max_bad_share is .*, expected a share of the images, from 0 to 1"):
        BadImages(10, max_share=share)


def test_images_repaired_or_removed_since_the_last_start_no_longer_count(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        path.touch()
    before = BadImages(300, record)
    for path in paths[:3]:
        before.add(str(path), "empty")
    Image.new("L", (2, 2)).save(paths[0])
    paths[2].unlink()
    with pytest.raises(UserError, match="2 of 10 images") as caught:
        BadImages(10, record).add(str(paths[3]), "torn")
    assert f"{paths[1]} (empty), {paths[3]} (torn);" in str(caught.value)
    BadImages(20, record).add(str(paths[3]), "torn")  # the fourth line of the record, but two are bad and two may be


def test_the_summary_tells_what_is_still_bad(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.touch()
    worker, main = BadImages(300, record), BadImages(300, record)
    assert main.summary() == ""
    for path in paths:
        worker.add(str(path), "empty")
    assert main.summary() == f"3 of 300 images cannot be read and are passed over: see {record}"
    Image.new("L", (2, 2)).save(paths[0])
    paths[1].unlink()
    later = BadImages(300, record)
    assert later.summary() == f"1 of 300 images cannot be read and is passed over: see {record}"


@pytest.mark.parametrize(
    "name", ["two\nlines.png", "a\ttab.png", '"quoted".png', "line\x85end\u2028.png", "caf\udce9.png"]
)
def test_names_of_any_characters_are_recorded_once(tmp_path: Path, name: str) -> None:
    record, path = tmp_path / "bad_files.txt", tmp_path / name
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes no such names")
    for _ in range(2):  # two runs
        BadImages(300, record).add(str(path), "empty")
        BadImages(300, record).add("relative" + name, "empty")
    assert len(record.read_bytes().strip().split(b"\n")) == 2
    assert BadImages(300, record).recorded() == {str(path): "empty", "relative" + name: "empty"}
    assert BadImages(300, record).bad() == {str(path): "empty"}


def test_suffixes_are_formats_that_pillow_knows() -> None:
    known = {*Image.registered_extensions(), ".avif"}  # which not every Pillow is built with
    assert image_files.SUFFIXES - known == set()


def test_a_record_of_images_that_were_copied_since_keeps_those_of_this_place(tmp_path: Path) -> None:
    record = tmp_path / "bad_files.txt"
    for place in ("old", "old too", "new"):
        (tmp_path / place).mkdir()
        for name in ("a.png", "line\nbreak.png"):
            (tmp_path / place / name).write_bytes(b"")
            BadImages(1000, record).add(str(tmp_path / place / name), "no image")
    bad_images = BadImages(1000, record)
    bad_images.keep_only([str(tmp_path / "new"), "squares.npz"])
    assert set(bad_images.recorded()) == {str(tmp_path / "new" / name) for name in ("a.png", "line\nbreak.png")}
    assert bad_images.summary().startswith("2 of 1000 images cannot be read")
    before = record.stat().st_mtime_ns
    bad_images.keep_only([str(tmp_path / "new"), "squares.npz"])
    assert record.stat().st_mtime_ns == before
    bad_images.keep_only([])
    assert bad_images.recorded() == {}
    BadImages(1000, tmp_path / "none.txt").keep_only([])
    assert not (tmp_path / "none.txt").exists()
