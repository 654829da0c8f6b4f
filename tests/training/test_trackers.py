"""What TensorBoard and W&B are told: read back from event files, and from a module that stands in for wandb."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from tests.training.toy import toy_config, toy_fit, toy_task
from training.metrics_log import RunLog
from training.trackers import WANDB_NAME, settings_of


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path, name: str, split: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines(run) if line["split"] == split and name in line}


def forget_checkpoints(run: Path) -> None:
    for checkpoint in (run / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()


def read(run: Path) -> Any:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = event_accumulator.EventAccumulator(
        str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0}
    )
    return accumulator.Reload()


def scalars(events: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def hparams(events: Any) -> dict[str, Any]:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = events.PluginTagToContent("hparams")
    assert list(found) == ["_hparams_/session_start_info"]
    said = HParamsPluginData.FromString(*found.values()).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in said.items()}


def test_tensorboard_shows_settings_figures_and_previews_of_a_run_in_one_folder(tmp_path: Path):
    toy_fit(tmp_path, toy_config(steps=8, tracker="tensorboard", preview_every=4))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # a folder in it would be another run
    events = read(tmp_path)
    for split, name in (("train", "loss"), ("train", "grad_norm"), ("validation", "loss")):
        shown, written = scalars(events, f"{split}/{name}"), figures(tmp_path, name, split)
        assert [step for step, _ in shown] == list(written)
        assert [value for _, value in shown] == pytest.approx(list(written.values()))
    previews = events.Images("preview")
    assert [event.step for event in previews] == [4, 8]
    for event in previews:
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        kept = Image.open(tmp_path / "previews" / f"step_{event.step:08d}.png")
        assert (np.asarray(picture) == np.asarray(kept.convert("RGB"))).all()  # to the last level
    told = hparams(events)
    assert told["train.learning_rate"] == 0.01
    assert told["train.compile"] is False
    assert told["train.betas"] == "[0.9, 0.999]"
    assert told["model.width"] == 16
    (text,) = events.Tensors("config/text_summary")
    assert "learning_rate: 0.01" in text.tensor_proto.string_val[0].decode()


def test_evaluations_arrive_too(tmp_path: Path):
    log = RunLog(tmp_path, Accelerator(cpu=True), "tensorboard", 0, 10, {"train": {"steps": 10}})
    log.evaluation(5, {"rfid": 12.5})
    log.evaluation(10, {"rfid": 11.0})
    log.close()
    assert scalars(read(tmp_path), "evaluation/rfid") == [(5, 12.5), (10, 11.0)]


def test_a_continued_run_doubles_nothing_in_tensorboard(tmp_path: Path):
    config = {"tracker": "tensorboard", "log_every": 1, "preview_every": 2, "save_every": 5}
    toy_fit(tmp_path, toy_config(**config), task=toy_task(raise_stop_at=8))
    newest = max((tmp_path / "checkpoints").iterdir())
    for file in newest.iterdir():  # damaged: the run goes back to step 5, and steps 6 to 8 come again
        file.write_bytes(b"")
    toy_fit(tmp_path, toy_config(**config, steps=14, keep_newest=2))
    events = read(tmp_path)
    assert [step for step, _ in scalars(events, "train/loss")] == list(range(1, 15))
    assert dict(scalars(events, "train/loss")) == pytest.approx(figures(tmp_path, "loss", "train"))
    assert [event.step for event in events.Images("preview")] == list(range(2, 15, 2))
    assert hparams(events)["train.steps"] == 12
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")}
    assert ["steps: 14" in text for text in texts.values()] == [False, True]  # of the steps from there on
    assert all(path.is_file() for path in (tmp_path / "tensorboard").iterdir())


def test_a_run_that_begins_again_leaves_nothing_of_what_was_there(tmp_path: Path):
    toy_fit(tmp_path, toy_config(tracker="tensorboard", learning_rate=0.5))
    forget_checkpoints(tmp_path)
    toy_fit(tmp_path, toy_config(tracker="tensorboard", steps=4))
    events = read(tmp_path)
    assert [step for step, _ in scalars(events, "train/loss")] == [2, 4]
    assert hparams(events)["train.learning_rate"] == 0.01


def test_a_tracker_that_is_turned_on_later_has_the_settings_too(tmp_path: Path):
    toy_fit(tmp_path, toy_config(steps=6))
    toy_fit(tmp_path, toy_config(steps=8, tracker="tensorboard"))
    assert hparams(read(tmp_path))["train.steps"] == 8


class FakeRun:
    """As W&B's: rows one after another, none of which is ever taken back."""

    def __init__(self, options: Mapping[str, Any], before: Sequence[dict[str, Any]]) -> None:
        self.options, self.rows = options, list(before)
        self.settings: dict[str, Any] = {}
        self.config = SimpleNamespace(update=self.update)
        self.axes: dict[str, str] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change
        self.settings |= values

    def log(self, values: dict[str, Any]) -> None:
        self.rows.append(values)

    def steps(self, name: str) -> list[int]:
        return [row["step"] for row in self.rows if name in row]

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeRun]]:
    """The runs that were opened, by a module `wandb` on sys.path that remembers them."""
    place = tmp_path / "modules"
    place.mkdir()
    (place / "wandb.py").write_text("def Image(picture):\n    return ('image', picture)\n")
    monkeypatch.syspath_prepend(str(place))
    wandb = importlib.import_module("wandb")
    opened: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        same = [run for run in opened if run.options["id"] == options["id"] and options["resume"] == "allow"]
        opened.append(FakeRun(options, same[-1].rows if same else []))
        return opened[-1]

    monkeypatch.setattr(wandb, "init", init, raising=False)
    yield opened
    del sys.modules["wandb"]


@pytest.mark.parametrize("damaged", [False, True])
def test_wandb_is_told_the_same_and_continues_the_same_run(tmp_path: Path, wandb_runs: list[FakeRun], damaged: bool):
    run = tmp_path / "run"
    config = {"tracker": "wandb", "log_every": 1, "preview_every": 4, "save_every": 5, "keep_newest": 2}
    toy_fit(run, toy_config(**config), task=toy_task(raise_stop_at=8))  # before the validation that is due then
    if damaged:  # the run goes back to step 5, and what was sent of steps 6 to 8 comes again
        for file in max((run / "checkpoints").iterdir()).iterdir():
            file.write_bytes(b"")
    toy_fit(run, toy_config(**config, max_nonfinite_steps=7))
    first, second = wandb_runs
    assert first.options == second.options
    assert first.options["project"] == "zellige"
    assert (first.options["name"], first.options["dir"]) == ("run", str(run))
    assert first.axes == second.axes == {"*": "step"}
    assert first.settings["train.betas"] == "[0.9, 0.999]"
    assert [found.settings["train.max_nonfinite_steps"] for found in wandb_runs] == [20, 7]
    assert first.finished
    assert second.finished
    assert second.steps("train/loss") == list(range(1, 13))
    losses = {row["step"]: row["train/loss"] for row in second.rows if "train/loss" in row}
    assert losses == pytest.approx(figures(run, "loss", "train"))
    assert second.steps("validation/loss") == second.steps("preview") == [4, 8, 12]
    for row in second.rows:
        if "preview" in row:  # a picture: a tensor would be stretched to its own extremes
            kept = Image.open(run / "previews" / f"step_{row['step']:08d}.png")
            assert row["preview"][1].tobytes() == kept.tobytes()


def test_a_new_run_in_the_place_of_another_is_another_of_wandb(tmp_path: Path, wandb_runs: list[FakeRun]):
    for _ in range(2):
        run = tmp_path / "run"
        toy_fit(run, toy_config(tracker="wandb", steps=2, log_every=1, save_every=100, validate_every=0))
        forget_checkpoints(run)
    ids = [found.options["id"] for found in wandb_runs]
    assert len(set(ids)) == 2
    assert json.loads((run / WANDB_NAME).read_text())["id"] == ids[1]
    assert [found.steps("train/loss") for found in wandb_runs] == [[1, 2]] * 2


def test_a_run_of_an_earlier_build_is_known_to_wandb_by_its_path(tmp_path: Path, wandb_runs: list[FakeRun]):
    run = tmp_path / "run"
    toy_fit(run, toy_config(steps=4))
    toy_fit(run, toy_config(steps=6, tracker="wandb"))
    (found,) = wandb_runs
    assert found.options["id"] == hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]


def test_settings_are_numbers_and_text_by_their_paths():
    config = {"model": {"kind": "vae", "widths": (8, 16), "prior": None}, "data": {}, "flip": True, "path": Path("x")}
    assert settings_of(config) == {
        "model.kind": "vae",
        "model.widths": "[8, 16]",
        "model.prior": "null",
        "data": "{}",
        "flip": True,
        "path": "x",
    }
    assert settings_of({}) == {}
