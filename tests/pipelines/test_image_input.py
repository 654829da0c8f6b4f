from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.image_input import as_images, load_images, stacked


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(8, 10, 3))


def test_a_picture_its_file_and_its_tensors_are_the_same_image(picture: Image.Image, tmp_path: Path):
    picture.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # 3 8 10, uint8
    expected = pixels / 127.5 - 1
    for given in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), tmp_path, pixels, expected):
        (image,) = as_images(given, 3)
        torch.testing.assert_close(image, expected)
    assert len(as_images([picture, tmp_path / "a.png", pixels], 3)) == 3
    assert len(as_images(pixels.expand(5, -1, -1, -1), 3)) == 5
    torch.testing.assert_close(load_images(tmp_path / "a.png")[0], expected)


def test_a_folder_is_read_in_the_order_of_names_at_one_size(picture: Image.Image, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    picture.resize((30, 20)).save(tmp_path / "sub" / "b.png")
    picture.save(tmp_path / "a.png")
    assert load_images(tmp_path, size=4).shape == (2, 3, 4, 4)
    assert load_images([tmp_path / "a.png"], size=(4, 5), channels=1).shape == (1, 1, 4, 5)
    with pytest.raises(UserError, match=r"images of 2 sizes \(8x10, 20x30\), expected one; give `size`"):
        load_images(tmp_path)


def test_the_middle_is_what_is_cut_out(tmp_path: Path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert load_images(tmp_path / "wide.png", size=4, channels=1).eq(1).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 4, 4) + 100, r"values from 100 to 100, expected \[-1, 1\]; divide by 127.5 and subtract 1"),
        (torch.zeros(3, 4, 4) + 1.2, r"values from 1.2 to 1.2, expected \[-1, 1\]; scale them, or cut them off"),
        (torch.full((3, 4, 4), torch.nan), "values from nan to nan"),
        (torch.zeros(4, 4, 3), "images of shape 4x4x3, expected 3 channels"),
        (torch.zeros(1, 4, 4), "images of shape 1x4x4, expected 3 channels"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "images of torch.int64, expected floats"),
        (torch.zeros(4, 4), r"a tensor of shape \(4, 4\), expected images"),
        ([torch.zeros(4, 4)], r"an image of shape \(4, 4\), expected a tensor c H W"),
        (np.zeros((3, 4, 4)), r"images of type ndarray, expected a tensor b c H W.*torch\.from_numpy"),
        ([np.zeros((3, 4, 4))], r"got an array, .*torch\.from_numpy"),
        ([3], "an image of type int"),
        ([], "got no images"),
        ("missing.png", r"there is no image file missing\.png"),
    ],
)
def test_what_is_no_image_is_refused(given, message: str):
    with pytest.raises(UserError, match=message):
        as_images(given, 3)


def test_a_rounding_beyond_the_range_is_an_image():
    assert len(as_images(torch.ones(3, 2, 2) * 1.0005, 3)) == 1


def test_a_file_that_is_no_image_is_named(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image"):
        load_images(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        load_images(tmp_path / "empty")
    with pytest.raises(UserError, match="channels=4, expected 1"):
        load_images(tmp_path, channels=4)


def test_a_picture_that_is_no_image_and_a_line_of_pixels_are_user_errors(tmp_path: Path):
    with pytest.raises(UserError, match="got a picture that is no image"):
        as_images(Image.new("F", (4, 4)), 3)
    Image.new("L", (5000, 1)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=r"line\.png cannot be read as an image"):
        load_images(tmp_path, size=256)


def test_images_of_one_size_are_stacked():
    assert stacked([torch.zeros(1, 2, 3)] * 4).shape == (4, 1, 2, 3)
