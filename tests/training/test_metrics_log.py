from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from training.metrics_log import RunLog, StepReport, Timing, keep_lines


def log_of(run: Path, step: int = 0, tracker: str = "none") -> RunLog:
    run.mkdir(exist_ok=True)
    return RunLog(run, Accelerator(cpu=True), tracker, step, steps=100)


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_figures_and_clock_go_to_different_files(tmp_path: Path, capsys):
    log = log_of(tmp_path)
    for _ in range(4):
        log.step_done(StepReport(loss=1.0, images=8, seconds=0.5, waiting_seconds=0.1))
    log.train(4, {"loss": 0.25, "perplexity": math.inf}, [])
    log.validation(4, {"loss": 0.5}, improved=True)
    log.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 4, "split": "train", "loss": 0.25, "perplexity": None},  # JSON knows no infinity
        {"step": 4, "split": "validation", "loss": 0.5},
    ]
    (timing,) = lines(tmp_path / "timing.jsonl")
    assert timing["images_per_second"] == pytest.approx(16)
    assert timing["waiting_share"] == pytest.approx(0.2)
    assert "step 4/100  loss 0.25" in capsys.readouterr().out


def test_a_continued_run_takes_later_and_torn_lines_away_and_counts_on(tmp_path: Path):
    log = log_of(tmp_path)
    for step in (1, 2, 3):
        log.step_done(StepReport(loss=1.0, images=8, seconds=0.5, waiting_seconds=0.0))
        log.train(step, {"loss": 1 / step}, [])
    log.close()
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "spl')
    log = log_of(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[:2])
    assert (log.total.images, log.total.training_seconds) == (16, 1.0)
    assert keep_lines(tmp_path / "absent.jsonl", 2) == []


def test_a_warning_is_said_when_it_appears_and_again_only_after_it_was_gone(tmp_path: Path, capsys):
    log = log_of(tmp_path)
    for step, warnings in enumerate([["codes die"], ["codes die"], [], ["codes die"]]):
        log.train(step, {}, warnings)
    assert capsys.readouterr().out.count("warning: codes die") == 2


def test_waiting_for_data_is_a_warning_with_its_remedy(tmp_path: Path, capsys):
    log = log_of(tmp_path)
    log.step_done(StepReport(loss=1.0, images=8, seconds=10.0, waiting_seconds=5.0))
    log.train(1, {}, [])
    assert "raise train.workers" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 3])
def test_previews_are_pictures(tmp_path: Path, channels: int):
    picture = torch.linspace(-1.5, 1.5, 12 * channels).reshape(channels, 3, 4)
    log_of(tmp_path).preview(7, picture)
    image = Image.open(tmp_path / "previews" / "step_00000007.png")
    assert image.size == (4, 3)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    assert image.getextrema() == ((0, 255) if channels == 1 else image.getextrema())


def test_nothing_to_preview_is_no_file(tmp_path: Path):
    log_of(tmp_path).preview(7, None)
    assert not (tmp_path / "previews").exists()


def test_rates_of_no_time_are_zero():
    assert Timing().images_per_second == Timing().waiting_share == 0
