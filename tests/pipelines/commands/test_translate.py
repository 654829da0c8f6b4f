from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.cli import main
from pipelines.commands.translate import TranslateConfig, translate
from stage1_vae.modalities.multimodal import Multimodal, MultimodalConfig
from stage1_vae.networks import DenseConfig
from stage1_vae.vae import VAE, VAEConfig


def saved(folder: Path, pair: str, **changes: Any) -> str:
    torch.manual_seed(0)
    network = DenseConfig(hidden=(6,))
    settings = {"pair": pair, "latents": 2, "encoder": network, "decoder": network, "hidden": (5,), "classes": 3}
    model = Multimodal(MultimodalConfig(**{**settings, "length": 4, **changes}), (8, 8), None, ("ant", "bee", "cat"))
    for weight in model.parameters():
        weight.data.mul_(3)
    return str(model.save_pretrained(folder / pair))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    chance = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        pixels = chance.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def test_images_of_a_class_are_those_of_its_posterior_and_its_name_is_a_class_too(tmp_path: Path, capsys):
    model = saved(tmp_path, "image_label")
    for given, out in (("bee", "named"), ("1", "numbered")):
        assert main(["translate", "--model", model, "--label", given, "--num", "3", "--out", str(tmp_path / out)]) == 0
    assert "3 images of 'bee'" in capsys.readouterr().out
    first, second = (np.asarray(Image.open(tmp_path / out / "000002.png")) for out in ("named", "numbered"))
    assert np.array_equal(first, second)
    translate(TranslateConfig(model=model, label="2", num=3, out=str(tmp_path / "other")))
    assert not np.array_equal(first, np.asarray(Image.open(tmp_path / "other" / "000002.png")))
    with pytest.raises(UserError, match="other was begun with other settings: num was 3 and is now 2; give the former"):
        translate(TranslateConfig(model=model, label="2", num=2, out=str(tmp_path / "other")))
    with pytest.raises(UserError, match="label=7"):
        translate(TranslateConfig(model=model, label="7", out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_every_seed_that_is_taken_draws_its_own_images(tmp_path: Path):
    model = saved(tmp_path, "image_label")
    for seed in (0, 1 << 44, 2**64 - 1):
        translate(TranslateConfig(model=model, label="2", num=1, seed=seed, out=str(tmp_path / f"seed{seed}")))
    made = {np.asarray(Image.open(file)).tobytes() for file in tmp_path.glob("seed*/000000.png")}
    assert len(made) == 3


def test_a_text_that_the_model_would_cut_is_refused(tmp_path: Path):
    model = saved(tmp_path, "image_tokens")
    translate(TranslateConfig(model=model, text="bees", num=1, out=str(tmp_path / "a")))
    with pytest.raises(UserError, match="text='beetle' has 6 bytes, expected at most 4"):
        translate(TranslateConfig(model=model, text="beetle", num=1, out=str(tmp_path / "b")))


def test_classes_and_texts_of_images_are_told(tmp_path: Path, pictures: Path):
    (pictures / "bad.png").write_bytes(b"none")
    line = translate(
        TranslateConfig(model=saved(tmp_path, "image_label"), images=str(pictures), out=str(tmp_path / "a"))
    )
    assert line.startswith("3 images told")
    assert "1 image could not be read" in line
    rows = list(csv.DictReader((tmp_path / "a" / "told.csv").open(encoding="utf-8")))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(row["class"] in ("ant", "bee", "cat") and 1 / 3 < float(row["probability"]) <= 1 for row in rows)
    translate(TranslateConfig(model=saved(tmp_path, "image_tokens"), images=str(pictures), out=str(tmp_path / "b")))
    assert "text" in next(csv.reader((tmp_path / "b" / "told.csv").open(encoding="utf-8")))


@pytest.mark.parametrize(("pair", "part"), [("left_right", "right"), ("top_bottom", "top"), ("sizes", "half_size")])
def test_what_is_not_seen_changes_nothing(tmp_path: Path, pictures: Path, pair: str, part: str):
    model = saved(tmp_path, pair)
    config = TranslateConfig(model=model, images=str(pictures), part=part, num=2, out=str(tmp_path / "a"))
    translate(config)
    before = np.asarray(Image.open(tmp_path / "a" / "1_1.png"))
    assert before.shape == (8, 8)
    if pair != "sizes":
        pixels = np.asarray(Image.open(pictures / "1.png")).copy()
        (pixels[:, :4] if part == "right" else pixels[4:])[:] = 0  # the part that is not seen
        Image.fromarray(pixels).save(pictures / "1.png")
        translate(TranslateConfig(model=model, images=str(pictures), part=part, num=2, out=str(tmp_path / "b")))
        assert np.array_equal(before, np.asarray(Image.open(tmp_path / "b" / "1_1.png")))
    with pytest.raises(UserError, match=r"part=None, expected .*which of the two is seen"):
        translate(TranslateConfig(model=model, images=str(pictures), out=str(tmp_path / "c")))


def test_what_does_not_fit_is_refused(tmp_path: Path, pictures: Path):
    with pytest.raises(UserError, match="got nothing to translate"):
        TranslateConfig(model="m", out="o")
    with pytest.raises(UserError, match="got label and text"):
        TranslateConfig(model="m", out="o", label="1", text="a")
    with pytest.raises(UserError, match="this model is of left and right"):
        translate(TranslateConfig(model=saved(tmp_path, "left_right"), label="1", out=str(tmp_path / "o")))
    plain = VAE(VAEConfig(latents=1), (8, 8)).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="multimodal"):
        translate(TranslateConfig(model=str(plain), images=str(pictures), out=str(tmp_path / "o")))
