"""Decoding: every mode and orientation gives the picture a person sees."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, features

from common.errors import UserError
from images import files
from images.datasets import DataConfig, open_images
from images.files import flatten, open_upright, read_image, read_size
from images.listing import list_images


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
    assert np.abs(corners - [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]).max() <= 16


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


def test_a_smaller_margin_reads_less_of_a_jpeg_and_the_usual_one_what_it_always_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, x = np.mgrid[0:288, 0:384]
    waves = np.stack([np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)], axis=-1)
    Image.fromarray(np.uint8(127.5 + 127.5 * waves)).save(tmp_path / "waves.jpg", quality=95)
    decoded: list[tuple[int, int]] = []
    scale = files.scale_to_cover

    def noted(image, *size):
        decoded.append((image.height, image.width))
        return scale(image, *size)

    monkeypatch.setattr(files, "scale_to_cover", noted)
    usual, least = (read_image(tmp_path / "waves.jpg", 128, 128, 3, jpeg_margin=margin) for margin in (2, 1))
    assert np.array_equal(usual, read_image(tmp_path / "waves.jpg", 128, 128, 3))
    assert decoded == [(288, 384), (144, 192), (288, 384)]
    assert 0 < np.abs(least.astype(int)[:, :170] - usual[:, :170]).max() <= 16


def test_the_margin_of_the_data_reaches_each_source_and_the_settings_of_encodings(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "one.jpg")
    assert open_images(DataConfig(path=str(tmp_path), jpeg_margin=1)).jpeg_margin == 1
    assert open_images(DataConfig(path=str(tmp_path))).jpeg_margin == 2
    with pytest.raises(UserError, match=r"jpeg_margin=0\.5, expected at least 1"):
        DataConfig(jpeg_margin=0.5)
