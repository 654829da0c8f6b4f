from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from training.run_folder import open_run_folder, write_config

CONFIG = {
    "model": {"kind": "vqvae", "widths": (64, 128), "attention": None},
    "data": {"path": Path("images")},
    "train": {"steps": 10, "learning_rate": 3e-4, "workers": 2},
}


def with_train(**changes):
    return {**CONFIG, "train": {**CONFIG["train"], **changes}}


def test_the_config_is_written_as_plain_yaml(tmp_path: Path):
    open_run_folder(tmp_path / "runs" / "a")
    write_config(tmp_path / "runs" / "a", CONFIG, continued=False)
    read = yaml.safe_load((tmp_path / "runs" / "a" / "config.yaml").read_text())
    assert read["model"]["widths"] == [64, 128]
    assert read["data"]["path"] == "images"
    assert read["train"]["learning_rate"] == 3e-4


def test_the_same_config_continues_and_free_fields_may_change(tmp_path: Path):
    write_config(tmp_path, CONFIG, continued=False)
    write_config(tmp_path, CONFIG, continued=True)
    write_config(tmp_path, {**CONFIG, "data": {"path": Path("images"), "max_bad_share": 0.05}}, continued=True)
    write_config(tmp_path, with_train(steps=20, workers=8), continued=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["steps"] == 20


def test_another_config_is_refused_by_the_names_of_its_fields(tmp_path: Path):
    write_config(tmp_path, CONFIG, continued=False)
    other = {**with_train(learning_rate=1e-3, steps=20), "model": {"kind": "vqvae", "widths": (64, 128, 256)}}
    with pytest.raises(UserError) as caught:
        write_config(tmp_path, other, continued=True)
    message = str(caught.value)
    assert "train.learning_rate was 0.0003 and is now 0.001" in message
    assert "model.widths was [64, 128] and is now [64, 128, 256]" in message
    assert "train.steps" not in message
    assert "another --run folder" in message
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["learning_rate"] == 3e-4


def test_a_run_without_checkpoint_starts_anew_with_any_config(tmp_path: Path):
    write_config(tmp_path, CONFIG, continued=False)
    write_config(tmp_path, with_train(learning_rate=1e-3), continued=False)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["learning_rate"] == 1e-3


def test_an_edited_config_is_one_sentence(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("train: [1, 2")
    with pytest.raises(UserError, match="is not valid YAML"):
        write_config(tmp_path, CONFIG, continued=True)
