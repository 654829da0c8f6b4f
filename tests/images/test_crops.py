"""Random resized crops: torchvision's for the same random numbers, and the same for whatever moves with an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from common.errors import UserError
from images.crops import part_of_draw
from images.datasets import DataConfig, ImageDataset
from images.files import read_image
from images.random_numbers import uniforms
from images.sources import ArraySource, FileSource
from stage1_vae.binarise import NumberedImages
from stage1_vae.holes import HolesConfig, with_holes

SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)


@contextmanager
def fed_with(chance: np.ndarray) -> Iterator[None]:
    """torch draws area, proportions, top and left of a try from a row of numbers in [0, 1), in float64."""
    row, column = 0, 0

    def uniform(tensor: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
        nonlocal row, column
        if column == 2:  # the try before did not fit
            row, column = row + 1, 0
        column += 1
        return tensor.fill_(float(low) + (float(high) - float(low)) * chance[row, column - 1])

    def randint(low: int, high: int, size: tuple[int]) -> torch.Tensor:
        nonlocal column
        column += 1
        return torch.tensor([low + int((high - low) * chance[row, column - 1])])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform)
        patch.setattr(torch, "randint", randint)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (33, 200), (200, 30), (1, 9), (7, 7)])
def test_parts_are_those_of_torchvision(height: int, width: int) -> None:
    parts = set()
    for chance in uniforms(5, range(40), 40).reshape(-1, 10, 4):
        with fed_with(chance):
            theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), list(SCALE), list(RATIO))
        assert part_of_draw(chance, (32, 32), SCALE, RATIO)(height, width) == tuple(theirs)
        parts.add(tuple(theirs))
    assert len(parts) > (5 if min(height, width) > 1 else 0)


def test_proportions_are_those_of_the_training_image() -> None:
    """A part of a wide picture for wide training images is distorted no more than one for a square."""
    for chance in uniforms(6, range(50), 40).reshape(-1, 10, 4):
        _, _, height, width = part_of_draw(chance, (20, 40), (0.2, 0.5), RATIO)(300, 500)
        assert 0.74 < width / height / 2 < 1.35
        assert 0.19 < width * height / (300 * 500) < 0.51


def photo(height: int = 90, width: int = 120) -> Image.Image:
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    waves = 127 + 100 * np.sin(12 * x) * np.cos(9 * y)
    return Image.fromarray(np.stack([y * 255, x * 255, waves], 2).astype(np.uint8))


def test_a_part_is_cut_out_and_scaled_as_torchvision_does(tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    read = read_image(tmp_path / "photo.png", 24, 32, 3, crop=lambda height, width: (10, 20, 50, 70))
    assert np.array_equal(read, np.asarray(resized_crop(photo(), 10, 20, 50, 70, [24, 32], Image.Resampling.BICUBIC)))


def test_parts_of_turned_photos_and_large_jpegs_are_the_same_part(tmp_path: Path) -> None:
    """The part is told of the upright image; a JPEG that is decoded at a half or less shows the same."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo(600, 800).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    asked = []

    def crop(height: int, width: int) -> tuple[float, float, float, float]:
        asked.append((height, width))
        return 150, 200, 300, 400

    read = read_image(tmp_path / "turned.jpg", 30, 40, 3, crop=crop)
    assert asked == [(600, 800)]
    whole = resized_crop(photo(600, 800), 150, 200, 300, 400, [30, 40], Image.Resampling.BICUBIC)
    assert np.abs(read.astype(int) - np.asarray(whole)).mean() < 3


def dataset(source: Any, **changes: Any) -> ImageDataset:
    settings = {"path": "x", "image_size": 16, "channels": 1, "crop": "random_resized"}
    return ImageDataset(source, DataConfig(**{**settings, **changes}), augment_seed=4)


def test_a_draw_decides_the_part_and_nothing_else_does() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 50), dtype=np.uint8)
    train = dataset(ArraySource("noise", images), flip=True)
    batch = train.fetch([0, 1, 1, 3], [7, 8, 9, 10])["images"]
    assert torch.equal(train.fetch([1], [9])["images"], batch[2:3])
    assert not torch.equal(batch[1], batch[2])
    still = ImageDataset(train.source, train.config).fetch([1], [9])["images"]  # held out: from the center
    center = ImageDataset(train.source, DataConfig(path="x", image_size=16, channels=1))
    assert torch.equal(still, center.fetch([1], [0])["images"])


def holed(folder: Path, number: int) -> FileSource:
    """A photo of black with a white rectangle, which its mask says is missing."""
    pixels = np.zeros((90, 120), dtype=np.uint8)
    pixels[20 + number : 60, 30:80] = 255
    for name in (f"{number}.png", f"{number}.mask.png"):
        Image.fromarray(pixels).save(folder / name)
    return FileSource(folder, np.array([f"{number}.png".encode()]))


def test_holes_move_with_the_part_that_a_draw_sees(tmp_path: Path) -> None:
    train = dataset(holed(tmp_path, 3), flip=True, image_size=32)
    shares = []
    for draw in range(20):
        batch = with_holes(train.fetch([0], [draw]), HolesConfig(files=True), train, [0], [draw])
        white, hole = batch["images"][0, 0] > 127, batch["holes"][0]
        edge = int((white != hole).sum())
        assert edge <= 64 + 8  # a pixel on each side of a border at most
        inner = torch.nn.functional.avg_pool2d(batch["images"].float(), 5, 1, 2)[0, 0]
        assert hole[inner == 255].all()
        assert not hole[inner == 0].any()
        shares.append(float(hole.float().mean()))
    assert max(shares) > 2 * min(shares)  # parts of several sizes were seen


def test_chance_of_black_and_white_moves_with_the_part() -> None:
    """An image that is grey all over is drawn once: what a draw sees of it is that drawing's own part, enlarged."""
    images = ArraySource("grey", np.full((1, 16, 16), 128, dtype=np.uint8))
    train = NumberedImages(dataset(images, crop_scale=(0.25, 0.25), crop_ratio=(1, 1)), "once", training=True)
    whole = NumberedImages(ImageDataset(images, DataConfig(path="x", image_size=16, channels=1)), "once", training=True)
    drawing = whole.fetch([0], [0])["images"][0, 0]
    parts = {
        drawing[y : y + 8, x : x + 8].repeat_interleave(2, 0).repeat_interleave(2, 1).numpy().tobytes()
        for y in range(9)
        for x in range(9)
    }
    for draw in range(5):
        assert train.fetch([0], [draw])["images"][0, 0].numpy().tobytes() in parts


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("crop_scale", (0.5, 0.2), "two shares above 0, up to 1, the lesser first"),
        ("crop_scale", (0.0, 1.0), "two shares above 0"),
        ("crop_scale", (0.1, 1.1), "two shares above 0"),
        ("crop_ratio", (0.0, 1.0), "two numbers above 0"),
        ("crop_ratio", (1.0,), "two numbers above 0"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(field: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError, match=f"data.{field}=.*, expected {expected}"):
        DataConfig(**{field: value})
