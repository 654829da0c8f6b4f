"""`zellige profile`: the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import main
from tests.pipelines.test_cli import STAGE1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and images."""
    monkeypatch.chdir(tmp_path)
    Path("stage1.yaml").write_text(STAGE1)
    Path("images").mkdir()
    for number in range(24):
        Image.new("L", (16, 16), 10 * number).save(f"images/{number:02}.png")
    return tmp_path


def test_a_training_is_measured_compared_and_leaves_nothing_but_what_was_asked_for(folder: Path, capsys):
    before = {path.name for path in folder.rglob("*")}
    line = "profile train-stage1 --config stage1.yaml --data.path images --run runs/one --device cpu --steps 2"
    arguments = [*line.split(), "--compare", "train.batch_size=4 train.accumulate=2", "--json", "told.json"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert {path.name for path in folder.rglob("*")} == {*before, "told.json"}
    told = json.loads(Path("told.json").read_text())
    assert sum(told["shares"].values()) == pytest.approx(1)
    assert told["fetching"]["parts"]["decoding"] > 0
    assert told["step"]["forward: encoder"] > 0
    assert told["train"]["batch_size"] == 8
    assert [one["options"] for one in told["compared"]] == ["--train.batch_size 4 --train.accumulate 2"]
    assert told["compared"][0]["speed"] > 0
    assert "cpu: 2 steps of 8 images from step 0 on" in shown
    for sentence in told["advice"]:
        assert f"* {sentence}\n" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("profile", "profile needs a training, train-stage1, train-vae, train-table, train-sequence or train-stage2, "),
        ("profile --config stage1.yaml", "got --config: put profile before the command that trains"),
        ("profile train-stage1 --config stage1.yaml", "data.path is empty"),
        ("profile train-stage1 --config stage1.yaml --data.path images --steps 1", "steps=1, expected at least 2"),
        ("profile train-stage1 --config stage1.yaml --data.path images --compare bf16", "compare=bf16, expected"),
        ("profile train-stage1 --config stage1.yaml --data.path images --compare train.depth=3", "train.depth"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(folder: Path, capsys, line: str, message: str):
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err
