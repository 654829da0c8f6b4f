from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.training.runs import metrics
from tests.training.toy import toy_config, toy_fit, toy_task
from training.metrics_log import RunLog, StepReport, Timing, duration, keep_lines


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


@pytest.mark.parametrize(("samples", "unit"), [("rows", "rows"), ("encoded images", "images")])
def test_speeds_are_of_what_the_samples_are_called_and_figures_keep_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, samples: str, unit: str
):
    log = RunLog(tmp_path, Accelerator(cpu=True), "none", 0, steps=100, samples=samples)
    said: list[str] = []
    monkeypatch.setattr(log._bar, "set_postfix_str", lambda text, refresh: said.append(text))
    log.step_done(StepReport(loss=1.0, images=8, seconds=4.0, waiting_seconds=2.0))
    log.train(1, {"loss": 1.0}, [])
    log.close()
    assert said == [f"loss 1, 2 {unit}/s"]
    told = capsys.readouterr().out
    assert f"step 1/100  loss 1  2 {unit}/s, waiting for data 50%" in told
    assert ("or smaller image files" in told) == (unit == "images")
    assert lines(tmp_path / "timing.jsonl")[0]["images_per_second"] == 2


def test_a_task_is_asked_how_it_does_where_a_line_says_so_and_after_no_skipped_step(tmp_path: Path):
    task = toy_task(nan_draws=[61])  # in the eighth step
    toy_fit(tmp_path, toy_config(log_every=4), task=task)
    assert task.asked == [3, 11]
    lines = metrics(tmp_path, "train")
    assert ["input_mean_norm" in line for line in lines] == [True, False, True]


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
    assert keep_lines(tmp_path / "absent.jsonl", 2) == ([], 0)


def test_damaged_lines_are_taken_out_and_those_after_them_stay(tmp_path: Path, capsys):
    whole = ['{"step": 1, "split": "train"}\n', '{"step": 2, "split": "train"}\n', '{"step": 3, "split": "train"}']
    damaged = ["{" + whole[0], '{"stop": 1}\n', "17\n", "\n", *whole[:2], '{"step": "1"}\n', whole[2]]
    (tmp_path / "metrics.jsonl").write_text("".join(damaged))
    (tmp_path / "timing.jsonl").write_text('{"step": 1, "images": 8}\n')  # without its other fields
    log = log_of(tmp_path, step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(whole) + "\n"
    assert log.total == Timing()
    assert "metrics.jsonl: 5 damaged lines taken out: curves have a gap there" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text(whole[0] + '{"step": 2, "sp')  # cut short by a kill
    log_of(tmp_path, step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == whole[0]
    assert "damaged" not in capsys.readouterr().out


def test_a_warning_is_said_once_and_again_when_it_is_much_worse_or_after_long(tmp_path: Path, capsys):
    log = log_of(tmp_path)  # of 100 steps
    shares = {1: 40, 2: 31, 3: 45, 4: None, 5: 44, 6: 20, 7: 19, 8: 11, 56: 25, 57: 25}
    for step, share in shares.items():
        unused = [f"only {share}% of 512 codes are in use, below warn_usage_below=50%"] if share else []
        log.train(step, {}, [*unused, f"mse is {step / 10 + 1} times its best", "the disk hums"])
    said = [line.removeprefix("warning: ") for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line[5:7] for line in said if line.startswith("only")] == ["40", "20", "25"]  # halved; after 50 steps
    assert [line for line in said if line.startswith("mse")] == [f"mse is {n} times its best" for n in (1.1, 6.6)]
    assert said.count("the disk hums") == 2
    assert said.index("mse is 6.6 times its best") > said.index("the disk hums")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "only 5% used, below warn_usage_below=50%; try a smaller model.quantizer.layer.codebook_size, or "
            "model.quantizer.revive_after=500, or model.quantizer.l2_normalise=true with lookup_dim=8",
            "only 5% used, below warn_usage_below=50%; try a smaller --model.quantizer.layer.codebook_size, or "
            "--model.quantizer.revive_after 500, or --model.quantizer.l2_normalise true with lookup_dim=8",
        ),
        (
            "try a smaller adversarial.weight than 0.8, or adversarial.lecam_weight=0.01",
            "try a smaller --adversarial.weight than 0.8, or --adversarial.lecam_weight 0.01",
        ),
        ("try more --train.workers, or a model. Or data", "try more --train.workers, or a model. Or data"),
    ],
)
def test_remedies_are_said_as_the_command_line_takes_them(tmp_path: Path, capsys, written: str, said: str):
    log_of(tmp_path).warn(1, written)
    assert capsys.readouterr().out.splitlines()[-1] == f"warning: {said}"


def test_warnings_of_different_parts_are_of_different_kinds(tmp_path: Path, capsys):
    log = log_of(tmp_path)
    for step in (1, 2):
        log.train(step, {}, [f"depth{depth}: only {10 + depth + step}% of codes" for depth in range(3)])
    assert capsys.readouterr().out.count("warning: depth") == 3


def pace_lines(log: RunLog, count: int, seconds: float, capsys) -> list[str]:
    for number in range(count):
        log.step_done(StepReport(loss=1.0, images=8, seconds=60.0 if number < 2 else seconds, waiting_seconds=0.0))
    return [line for line in capsys.readouterr().out.splitlines() if "at this rate" in line]


@pytest.mark.parametrize(
    ("steps", "seconds", "after", "left"),
    [
        (100_002, 0.01, 22, "17 min"),  # 99,980 steps; after 20 that are not the first two
        (12_000, 1.0, 12, "3 h 20 min"),  # after 10 seconds of them
        (10_002, 30.0, 3, "3 days 11 h"),
        (1000, 0.001, 1000, None),  # done in a second
    ],
)
def test_after_the_first_steps_a_line_tells_how_long_the_others_take(tmp_path, capsys, steps, seconds, after, left):
    tmp_path.joinpath("run").mkdir()
    log = RunLog(tmp_path / "run", Accelerator(cpu=True), "none", 0, steps)
    assert pace_lines(log, after - 1, seconds, capsys) == []
    log = RunLog(tmp_path / "run", Accelerator(cpu=True), "none", 0, steps)
    lines = pace_lines(log, after + 100 if left else after, seconds, capsys)
    assert lines == ([f"at this rate: {left} left, validations and checkpoints not counted"] if left else [])


@pytest.mark.parametrize(
    ("seconds", "text"), [(50, "50 s"), (89.6, "90 s"), (100, "2 min"), (3570, "1 h 0 min"), (86_340, "1 day 0 h")]
)
def test_durations_as_people_say_them(seconds: float, text: str):
    assert duration(seconds) == text


def test_waiting_for_data_is_a_warning_with_its_remedy(tmp_path: Path, capsys):
    log = log_of(tmp_path)
    log.step_done(StepReport(loss=1.0, images=8, seconds=10.0, waiting_seconds=5.0))
    log.train(1, {}, [])
    assert "try more --train.workers" in capsys.readouterr().out


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
