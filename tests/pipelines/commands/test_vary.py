"""`vary`: files of variants, drawn with the settings that are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pipelines.commands.vary import VaryConfig, vary_files
from pipelines.pictures import to_pil
from tests.pipelines.conftest import make_pipeline


def test_vary_writes_its_files(model: Path, pictures: Path, tmp_path: Path):
    line = vary_files(VaryConfig(model=str(model), images=str(pictures / "0.png"), out=str(tmp_path / "v"), variants=3))
    assert line.startswith("3 variants of 1 image in ")
    names = [*(f"0_{variant}.png" for variant in range(3)), "samples.jsonl", "settings.json", "sheet.png"]
    assert sorted(path.name for path in (tmp_path / "v").iterdir() if path.name[0] != ".") == names


def test_all_settings_of_sampling_are_taken(model: Path, pictures: Path, tmp_path: Path):
    settings = {"temperature": 0.7, "top_k": 9, "guidance": 2.0, "guidance_schedule": "linear", "precision": "bf16"}
    config = VaryConfig(
        model=str(model),
        images=str(pictures / "2.png"),
        out=str(tmp_path / "o"),
        share=1.0,
        variants=1,
        label=1,
        **settings,
    )
    vary_files(config)
    pipeline = make_pipeline()
    expected = pipeline.vary([pictures / "2.png"], 1.0, labels=1, **settings).images[0]
    with Image.open(tmp_path / "o" / "2_0.png") as made:
        assert (np.array(made) == np.array(to_pil(expected))).all()
    plain = pipeline.vary([pictures / "2.png"], 1.0, labels=1).images[0]
    assert (np.array(to_pil(expected)) != np.array(to_pil(plain))).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a cat"}, "this model was not trained on captions and knows no prompt"),
        ({"text_encoder": "t5"}, "text_encoder=t5, but this model reads no vectors of captions"),
        ({"steps": 8}, "steps=8 for a transformer prior"),
        ({"guidance": 2.0}, "guidance=2.0 without a label, expected a class to follow; give a label"),
        ({"label": "class 9"}, "this model has no class named 'class 9'"),
    ],
)
def test_settings_that_the_model_cannot_follow_are_refused(options, message, model, pictures, tmp_path):
    config = VaryConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), **options)
    with pytest.raises(UserError, match=message):
        vary_files(config)


def test_originals_are_not_written_over(model: Path, pictures: Path):
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    for out in (pictures, pictures / "below"):
        with pytest.raises(UserError, match=r"lies in the folder of the images, .*name another --out folder"):
            vary_files(VaryConfig(model=str(model), images=str(pictures), out=str(out)))
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before


def test_an_unreadable_image_is_left_out_and_counted(model: Path, pictures: Path, tmp_path: Path):
    (pictures / "3.png").write_bytes(b"no image")
    config = VaryConfig(model=str(model), images=str(pictures), out=str(tmp_path / "out"), variants=1)
    assert vary_files(config).endswith("; 1 image could not be read (3.png)")


def test_impossible_options_are_refused():
    with pytest.raises(UserError, match=r"share=1.2, expected a share from 0 to 1"):
        VaryConfig(model="m", images="i", out="o", share=1.2)
