"""Masks: parts, files, sizes, and what is pasted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.editing import fitted_mask
from pipelines.image_folders import to_images
from pipelines.image_input import fit
from pipelines.masks import check_proportions, pasted, read_mask, rectangle, scaled_mask, window_around


@pytest.mark.parametrize(("part", "kept"), {"left": 8, "right": 12, "top": 10, "bottom": 10, "middle": 2 * 3}.items())
def test_named_parts(part, kept):
    keep = rectangle(4, 5, part)
    assert keep.shape == (4, 5)
    assert keep.sum() == kept
    corner = {"left": (0, 0), "top": (0, 0), "right": (3, 4), "bottom": (3, 4), "middle": (2, 2)}[part]
    assert keep[corner]


def test_a_mask_is_white_where_pixels_stay(tmp_path: Path):
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[False, False, True, True]]


def test_a_pixel_of_a_smaller_mask_is_kept_where_all_that_it_covers_is():
    keep = torch.ones(6, 9, dtype=torch.bool)
    keep[5, 0] = keep[2, 4] = False
    assert scaled_mask(keep, 2, 3).tolist() == [[True, False, True], [False, True, True]]
    assert scaled_mask(keep, 12, 18).sum() == 12 * 18 - 8


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (31, 17), (9, 40)])
def test_a_mask_is_fitted_as_its_image_is(shape):
    """The mask of an image of black and white is that image."""
    keep = torch.zeros(shape, dtype=torch.bool)
    keep[:, shape[1] // 3 :] = True
    image = fit(Image.fromarray((keep * 255).to(torch.uint8).numpy()), 16, 16)
    certain = (np.array(image) < 5) | (np.array(image) > 250)
    assert certain.mean() > 0.7
    assert ((to_images(image)[0, 0] > 0) == fitted_mask(keep, 16, 16))[torch.from_numpy(certain)].all()


def test_proportions_may_differ_by_the_rounding_of_a_side():
    for height, width in ((288, 384), (144, 192), (96, 128), (25, 33), (576, 768)):
        check_proportions(torch.ones(height, width), 288, 384, "the mask", "a.png")
    for height, width in ((77, 33), (384, 288), (16, 16), (27, 33)):
        with pytest.raises(UserError, match=rf"the mask has {width}x{height} pixels and a.png 384x288, expected"):
            check_proportions(torch.ones(height, width), 288, 384, "the mask", "a.png")


def test_the_window_goes_around_the_hole_and_stays_inside():
    keep = torch.ones(30, 50, dtype=torch.bool)
    keep[4:8, 40:44] = False
    assert window_around(keep, 16, 16, "a.png") == (0, 20, 30, 30)
    keep[6:26, 20:30] = False
    assert window_around(keep, 16, 16, "a.png") == (0, 17, 30, 30)
    assert window_around(keep, 16, 32, "a.png") == (2, 0, 25, 50)  # rows 4 to 25


def test_pasted_pixels_are_exact_and_the_difference_fades_out_inside_what_is_drawn():
    originals, drawn = torch.full((1, 1, 20, 20), 0.3), torch.full((1, 1, 20, 20), -0.1)
    keep = (torch.arange(20).expand(20, 20) < 8)[None]
    originals[:, :, :, 8:] = 0.9  # what should go must not show through
    result = pasted(drawn, originals, keep, 4)
    assert torch.equal(result[..., :8], originals[..., :8])
    row = result[0, 0, 10, 8:]
    assert (row.diff()[:4] < -0.05).all()
    assert row[0] < 0.3
    assert (row[4:] == drawn[0, 0, 0, 0]).all()
    assert torch.equal(pasted(originals, originals, keep, 4), originals)


def test_small_islands_fade_over_no_more_than_their_weight():
    originals, drawn = torch.ones(1, 1, 9, 9), torch.zeros(1, 1, 9, 9)
    keep = torch.zeros(1, 9, 9, dtype=torch.bool)
    keep[0, 4, 4] = True
    result = pasted(drawn, originals, keep, 1)
    assert result[0, 0, 4, 4] == 1
    assert 0 < result[0, 0, 3, 3] < 0.3
    assert result[0, 0, 0].abs().max() == 0
