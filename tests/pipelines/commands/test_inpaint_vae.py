"""`inpaint` of a VAE that was trained on images with holes: what is seen stays, what is missing is completed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.commands.inpaint import InpaintConfig, inpaint_files
from stage1_vae.networks import DenseConfig
from stage1_vae.vae import VAE, VAEConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and two black and white pictures of 8x8, the second with a mask."""
    torch.manual_seed(0)
    dense = DenseConfig(hidden=(6,))
    VAE(VAEConfig(latents=2, encoder=dense, decoder=dense, holes=True), (8, 8)).save_pretrained(tmp_path / "model")
    VAE(VAEConfig(latents=2, encoder=dense, decoder=dense), (8, 8)).save_pretrained(tmp_path / "whole")
    pictures = np.random.default_rng(0).integers(0, 2, (2, 8, 8)).astype(np.uint8) * 255
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "in" / f"{number}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:5, 3:] = 255
    Image.fromarray(mask).save(tmp_path / "in" / "1.mask.png")
    return tmp_path


def config(folder: Path, **given: object) -> InpaintConfig:
    settings = {"model": str(folder / "model"), "images": str(folder / "in"), "out": str(folder / "out"), "draws": 20}
    return InpaintConfig(**{**settings, **given})


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def test_halves_stay_and_the_others_are_drawn(folder: Path):
    line = inpaint_files(config(folder, variants=3))
    assert line.startswith("3 variants of each of 2 images")
    before = pixels(folder / "in" / "0.png")
    made = [pixels(folder / "out" / f"0_{variant}.png") for variant in range(3)]
    assert all((one[:, :4] == before[:, :4]).all() for one in made)
    assert (made[0][:, 4:] != made[1][:, 4:]).any() or (made[0][:, 4:] != made[2][:, 4:]).any()


def test_a_variant_is_the_same_among_however_many(folder: Path):
    inpaint_files(config(folder, variants=2, seed=2**64 - 1))
    inpaint_files(config(folder, variants=4, seed=2**64 - 1, out=str(folder / "more")))
    for name in ("0_0.png", "0_1.png", "1_0.png", "1_1.png"):
        assert (pixels(folder / "out" / name) == pixels(folder / "more" / name)).all()


def test_the_expected_completion_of_a_mask_beside_the_image(folder: Path):
    image = folder / "in" / "1.png"
    inpaint_files(config(folder, images=str(image), keep="masks", expected=True))
    before, made = pixels(image), pixels(folder / "out" / "1_0.png")
    missing = pixels(folder / "in" / "1.mask.png") > 0
    assert (made[~missing] == before[~missing]).all()
    assert ((made[missing] > 0) & (made[missing] < 255)).all()  # means of black and white
    assert not (folder / "out" / "1_1.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": "masks"}, "0.png has no mask 0.mask.png beside it, expected one, white where pixels are missing"),
        ({"temperature": 0.5, "paste": False}, "got temperature, paste for a VAE, expected none of these"),
        ({"model": "whole"}, "this model is a vae of whole images, expected one that knows missing pixels"),
        ({"draws": 0}, "draws=0, expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, given: dict[str, object], message: str):
    if "model" in given:
        given = {"model": str(folder / "whole")}
    with pytest.raises(UserError) as caught:
        inpaint_files(config(folder, **given))
    assert message in str(caught.value)


def test_a_damaged_mask_is_named(folder: Path):
    mask = folder / "in" / "1.mask.png"
    mask.write_bytes(mask.read_bytes()[:-25])
    with pytest.raises(UserError, match=r"1.mask.png cannot be read: .*white where pixels are missing"):
        inpaint_files(config(folder, images=str(folder / "in" / "1.png"), keep="masks"))


def test_models_of_codes_have_no_expected_completion(model: Path, pictures: Path, tmp_path: Path):
    with pytest.raises(UserError, match="expected and draws are for a VAE, and this is a model of codes"):
        inpaint_files(InpaintConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), expected=True))
