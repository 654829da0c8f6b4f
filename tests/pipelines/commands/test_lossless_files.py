"""Archives without loss from the command line: compress, info, decompress, interrupted and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipelines.lossless_files as lossless_files
from common.errors import UserError
from pipelines.codec.lossless import LosslessCodec
from pipelines.commands.compress import CompressConfig, compress_files
from pipelines.commands.decompress import DecompressConfig, decompress_files
from pipelines.commands.info import InfoConfig, describe_file
from tests.stage1_vae.exact.tiny import tiny_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey model of 8x6 pixels."""
    return tiny_vae("dense_skip").save_pretrained(tmp_path_factory.mktemp("vae") / "model")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Nine images of 8x6 pixels, one in a subfolder, and one that is cut short."""
    folder, generator = tmp_path / "digits", np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    for name in [*(f"{number}.png" for number in range(8)), "sub/a.bmp"]:
        Image.fromarray(generator.integers(0, 256, (8, 6), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "3.png").read_bytes()[:50])
    return folder


def config_for(vae: Path, digits: Path, out: Path, **settings) -> CompressConfig:
    return CompressConfig(
        model=str(vae), images=str(digits), out=str(out), archive=True, max_bad_share=0.2, device="cpu", **settings
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_pixel_comes_back(vae, digits, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    said = compress_files(config_for(vae, digits, small, mode="lossless"))
    assert said.startswith("9 images compressed to ")
    assert "bits per dimension" in said
    assert "1 could not be read" in said
    assert compress_files(config_for(vae, digits, small)) == f"{small / 'images.zlg'} is there already"
    config = DecompressConfig(files=str(small), out=str(large), model=str(vae), device="cpu")
    assert decompress_files(dataclasses.replace(config, only=(8, 2))) == f"2 images in {large}"
    assert decompress_files(config) == f"7 images in {large}; 2 were there already"
    for path in digits.rglob("*.*"):
        if path.name != "broken.png":
            target = large / "images" / path.relative_to(digits).with_suffix(".png")
            assert np.array_equal(pixels(path), pixels(target)), path
    assert decompress_files(dataclasses.replace(config, model=None, models=str(vae.parent), out=str(tmp_path / "b")))
    with pytest.raises(UserError, match=r"images.zlg has no image 9, expected 0 to 8"):
        decompress_files(dataclasses.replace(config, only=(9,)))


def test_what_info_says(vae, digits, tmp_path):
    compress_files(config_for(vae, digits, tmp_path / "small"))
    path = tmp_path / "small" / "images.zlg"
    lines = describe_file(InfoConfig(file=str(path), model=str(vae), device="cpu")).splitlines()
    assert lines[0].startswith(f"{path}: 9 images, {path.stat().st_size} bytes")
    assert lines[1:3] == ["mode: lossless", "9 of 8x6 pixels in grey"]
    assert lines[3].startswith("bits per dimension: ")
    assert lines[3].endswith("by the model's ELBO")
    assert lines[-1] == "the model is here: vae with the likelihood logistic_mixture"
    assert describe_file(InfoConfig(file=str(path.parent))).splitlines()[1:4] == lines[1:4]
    with pytest.raises(UserError, match="is of mode lossless, whose images are what they were; leave against out"):
        describe_file(InfoConfig(file=str(path), model=str(vae), against=str(digits / "1.png")))


def test_a_killed_run_goes_on_with_the_next_segment(vae, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(lossless_files, "SEGMENT", 4)
    plain, coded = LosslessCodec.segment, []

    def killed(self, images, names=()):
        if len(coded) == 1:
            raise KeyboardInterrupt
        coded.append(names)
        return plain(self, images, names)

    monkeypatch.setattr(LosslessCodec, "segment", killed)
    with pytest.raises(KeyboardInterrupt):
        compress_files(config_for(vae, digits, tmp_path / "small"))
    assert [path.name for path in (tmp_path / "small" / "images.parts").iterdir()] == ["000000.zlg"]

    def counted(self, images, names=()):
        coded.append(names)
        return plain(self, images, names)

    monkeypatch.setattr(LosslessCodec, "segment", counted)
    compress_files(config_for(vae, digits, tmp_path / "small"))
    assert [name for names in coded for name in names] == [*(f"{n}.png" for n in range(8)), "sub/a.bmp"]
    assert not (tmp_path / "small" / "images.parts").exists()
    monkeypatch.setattr(LosslessCodec, "segment", plain)
    compress_files(config_for(vae, digits, tmp_path / "whole"))
    whole, taken_up = (
        LosslessCodec.from_pretrained(vae).decompress(tmp_path / f / "images.zlg") for f in ("whole", "small")
    )
    assert whole.equal(taken_up)

    Image.fromarray(np.zeros((8, 6), np.uint8)).save(digits / "5.png")  # an image changed: the archive is made anew
    compress_files(config_for(vae, digits, tmp_path / "small"))
    assert float(LosslessCodec.from_pretrained(vae).decompress(tmp_path / "small" / "images.zlg", [5]).max()) == -1


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("L", (6, 9)), "bad.png has 9x6 pixels in grey, expected 8x6 pixels in grey"),
        (Image.new("RGB", (6, 8)), "bad.png has pixels of mode RGB, expected L or 1 of 8 bits without transparency"),
        (Image.new("LA", (6, 8)), "bad.png has pixels of mode LA"),
        (Image.new("I;16", (6, 8)), "bad.png has pixels of mode I;16 of 16 bits"),
    ],
)
def test_images_that_would_not_come_back_are_refused(vae, digits, tmp_path, picture, message):
    picture.save(digits / "bad.png")
    with pytest.raises(UserError, match=message):
        compress_files(config_for(vae, digits, tmp_path / "small"))
    assert not (tmp_path / "small" / "images.zlg").exists()


def test_grey_levels_are_refused_by_a_model_of_black_and_white(digits, tmp_path):
    binary = tiny_vae("dense_bernoulli").save_pretrained(tmp_path / "binary")
    with pytest.raises(UserError, match=r"0.png has values between black and white"):
        compress_files(config_for(binary, digits, tmp_path / "small"))
    for path in digits.rglob("*.*"):
        if path.name != "broken.png":
            Image.fromarray(np.where(pixels(path) > 127, 255, 0).astype(np.uint8)).convert("1").save(path)
    assert compress_files(config_for(binary, digits, tmp_path / "small")).startswith("9 images")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"archive": False}, "mode=lossless writes one archive"),
        ({"crop": True}, "mode=lossless with crop"),
        ({"max_side": 5}, "mode=lossless with max_side"),
        ({"label": 0}, "mode=lossless with label"),
        ({"mode": "packed"}, "is a VAE, which has no codes; take mode lossless"),
    ],
)
def test_settings_that_it_does_not_have(vae, digits, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        compress_files(dataclasses.replace(config_for(vae, digits, tmp_path / "small"), **settings))


def test_other_models_have_no_mode_lossless(model, images, tmp_path, vae, digits):
    config = config_for(model, images, tmp_path / "small", mode="lossless")
    with pytest.raises(UserError, match="is no VAE, whose likelihood it takes"):
        compress_files(config)
    compress_files(dataclasses.replace(config, mode=None))
    with pytest.raises(UserError, match="holds codes, and the model is a VAE"):
        decompress_files(DecompressConfig(files=str(tmp_path / "small"), out=str(tmp_path / "a"), model=str(vae)))
    compress_files(config_for(vae, digits, tmp_path / "lossless"))
    with pytest.raises(UserError, match="is of mode lossless, which a VAE decodes"):
        decompress_files(DecompressConfig(files=str(tmp_path / "lossless"), out=str(tmp_path / "b"), model=str(model)))
