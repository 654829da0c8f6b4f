"""`inpaint`: files whose kept pixels are the originals', of the model's size or of their own, and masks that fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.commands.inpaint import InpaintConfig, inpaint_files
from pipelines.commands.vary import VaryConfig, vary_files
from pipelines.pictures import to_pil
from tests.pipelines.conftest import make_pipeline


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def photo(path: Path, width: int, height: int) -> Path:
    """A grey picture of noise."""
    values = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def mask(path: Path, keep: np.ndarray) -> Path:
    Image.fromarray(np.where(keep, 255, 0).astype(np.uint8)).save(path)
    return path


def test_inpaint_writes_variants_and_a_sheet(model: Path, pictures: Path, tmp_path: Path):
    out = tmp_path / "out"
    line = inpaint_files(InpaintConfig(model=str(model), images=str(pictures), out=str(out), variants=2, seed=3))
    assert line == f"2 variants of each of 3 images in {out}, 6 of them new, the first on {out}/sheet.png"
    names = sorted(path.name for path in out.iterdir() if path.name[0] != ".")
    made = [f"{i}_{variant}.png" for i in range(3) for variant in range(2)]
    assert names == [*made, "samples.jsonl", "settings.json", "sheet.png"]
    pipeline = make_pipeline()
    image = pipeline.images(pictures / "1.png")
    keep = torch.arange(16).expand(16, 16) < 8
    made = pipeline.inpaint(image.expand(2, -1, -1, -1), keep, seed=3, first_index=2).images
    for variant in range(2):
        assert (pixels(out / f"1_{variant}.png") == np.array(to_pil(made[variant]))).all()
    assert (pixels(out / "1_0.png") != pixels(out / "1_1.png")).any()


def test_kept_pixels_are_those_of_the_original_file_exactly(model: Path, pictures: Path, tmp_path: Path):
    keep = np.random.default_rng(1).random((16, 16)) < 0.7
    config = InpaintConfig(
        model=str(model),
        images=str(pictures),
        out=str(tmp_path / "out"),
        keep=str(mask(tmp_path / "mask.png", keep)),
        variants=2,
    )
    inpaint_files(config)
    inpaint_files(replace(config, out=str(tmp_path / "decoded"), paste=False))
    for number in range(3):
        original = pixels(pictures / f"{number}.png")
        for variant in range(2):
            made = pixels(tmp_path / "out" / f"{number}_{variant}.png")
            assert (made[keep] == original[keep]).all()
            assert (made[~keep] != original[~keep]).mean() > 0.9
            decoded = pixels(tmp_path / "decoded" / f"{number}_{variant}.png")
            assert (decoded[keep] != original[keep]).mean() > 0.9


@pytest.mark.parametrize(("width", "height"), [(50, 32), (33, 47), (12, 10), (16, 16)])
def test_a_photo_at_its_own_size_changes_nowhere_but_in_the_hole(model: Path, tmp_path: Path, width: int, height: int):
    original = photo(tmp_path / "photo.png", width, height)
    keep = np.ones((height, width), dtype=bool)
    keep[height // 3 : height // 2, width // 2 : width - 2] = False
    config = InpaintConfig(
        model=str(model),
        images=str(original),
        out=str(tmp_path / "out"),
        keep=str(mask(tmp_path / "mask.png", keep)),
        variants=1,
        own_size=True,
    )
    inpaint_files(config)
    made, before = pixels(tmp_path / "out" / "photo_0.png"), pixels(original)
    assert made.shape == before.shape
    assert (made[keep] == before[keep]).all()
    assert (made[~keep] != before[~keep]).mean() > 0.8


def test_what_is_drawn_at_a_photos_own_size_is_what_the_model_draws_of_the_window(model: Path, tmp_path: Path):
    """A photo of three times the model's size and twice as wide: of each pixel of the hole three by three are made."""
    values = np.random.default_rng(0).integers(60, 190, (16, 32), dtype=np.uint8)
    Image.fromarray(values).resize((96, 48), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    keep = np.ones((48, 96), dtype=bool)
    keep[:, 48:84] = False  # the window is as high as the photo, its middle at column 66
    path = mask(tmp_path / "mask.png", keep)
    config = InpaintConfig(
        model=str(model), images=str(tmp_path / "photo.png"), out=str(tmp_path / "o"), keep=str(path), own_size=True
    )
    inpaint_files(config)
    pipeline = make_pipeline()
    window = Image.open(tmp_path / "photo.png").crop((42, 0, 90, 48)).resize((16, 16), Image.Resampling.BICUBIC)
    small = torch.from_numpy(keep[::3, 42:90:3].copy())
    drawn = pipeline.inpaint([window], small, paste=False).images[0]
    made = pixels(tmp_path / "o" / "photo_0.png").astype(float)
    of_hole = made[:, 60:72]  # beyond 12 pixels from its borders, three times the stride, nothing fades in
    of_hole = of_hole.reshape(16, 3, 4, 3).mean((1, 3))
    expected = np.array(to_pil(drawn)).astype(float)[:, 6:10]
    assert np.corrcoef(of_hole.ravel(), expected.ravel())[0, 1] > 0.9


def test_a_mask_is_cropped_as_its_image_is(model: Path, tmp_path: Path):
    """Of a photo of 32x16 the middle half is made; the mask's hole in its middle stays in the middle."""
    original = photo(tmp_path / "photo.png", 32, 16)
    keep = np.ones((16, 32), dtype=bool)
    keep[:, 12:20] = False
    config = InpaintConfig(
        model=str(model),
        images=str(original),
        out=str(tmp_path / "out"),
        keep=str(mask(tmp_path / "mask.png", keep)),
        variants=1,
    )
    inpaint_files(config)
    made, before = pixels(tmp_path / "out" / "photo_0.png"), pixels(original)[:, 8:24]
    changed = (made != before).any(0)
    assert not changed[:4].any()
    assert changed[4:12].all()
    assert not changed[12:].any()


@pytest.mark.parametrize(
    ("keep", "own_size", "message"),
    [
        (
            np.ones((77, 33), dtype=bool),
            False,
            r"the mask .* has 33x77 pixels and .*photo.png 384x288, expected",
        ),
        (np.ones((288, 384), dtype=bool), False, r"the mask .* keeps everything: nothing is left to draw"),
        (np.zeros((288, 384), dtype=bool), True, r"the mask .* keeps nothing: it is black all over"),
        (
            np.arange(384) * np.ones((288, 1)) < 380,
            False,
            r"as far as .*photo.png is in the middle .* keeps everything",
        ),
        (
            np.abs(np.arange(384) - 200) * np.ones((288, 1)) < 40,
            True,
            r"what is to be drawn of .*photo.png spans 384x288 pixels, expected at most 288x288",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_is_written(
    model: Path, tmp_path: Path, keep: np.ndarray, own_size: bool, message: str
):
    if "spans" not in message and keep.shape == (77, 33):
        keep[:20] = False
    config = InpaintConfig(
        model=str(model),
        images=str(photo(tmp_path / "photo.png", 384, 288)),
        out=str(tmp_path / "out"),
        keep=str(mask(tmp_path / "mask.png", keep)),
        own_size=own_size,
    )
    with pytest.raises(UserError, match=message):
        inpaint_files(config)
    assert not list((tmp_path / "out").glob("*.png"))


def test_one_image_of_other_proportions_among_many_is_named_at_once(model: Path, pictures: Path, tmp_path: Path):
    photo(pictures / "wide.png", 20, 10)
    path = mask(tmp_path / "mask.png", np.arange(256).reshape(16, 16) < 100)
    config = InpaintConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), keep=str(path))
    with pytest.raises(UserError, match=r"has 16x16 pixels and .*wide.png 20x10, expected the same size"):
        inpaint_files(config)
    assert not (tmp_path / "out").exists()


def test_variants_of_other_settings_are_not_mixed(model: Path, pictures: Path, tmp_path: Path):
    config = InpaintConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), variants=2)
    inpaint_files(config)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert "0 of them new" in inpaint_files(config)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="keep was 'left' and is now 'top'"):
        inpaint_files(replace(config, keep="top"))
    with pytest.raises(UserError, match=r"temperature was 1.0 and is now 0.5"):
        inpaint_files(replace(config, temperature=0.5))
    vary = VaryConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), variants=2)
    with pytest.raises(UserError, match=r"out is a folder which `zellige inpaint` began; name another --out"):
        vary_files(vary)


def test_originals_are_not_written_over(model: Path, pictures: Path):
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    for out in (pictures, pictures / "below"):
        with pytest.raises(UserError, match=r"lies in the folder of the images, .*name another --out folder"):
            inpaint_files(InpaintConfig(model=str(model), images=str(pictures), out=str(out)))
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": 0}, "variants=0, expected at least 1"),
        ({"seed": -1}, "seed=-1, expected 0 to"),
        ({"own_size": True, "paste": False}, "got own_size=true with paste=false, expected either"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        InpaintConfig(model="m", images="i", out="o", **options)


def test_a_part_that_is_none_is_told(model: Path, pictures: Path, tmp_path: Path):
    config = InpaintConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), keep="lefft")
    with pytest.raises(UserError, match="keep=lefft is neither a file nor one of left, right, top, bottom, middle"):
        inpaint_files(config)
