"""When checkpoints are made, what is kept of them, what damage costs, and how commands end."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import Stopped, UserError
from pipelines import cli
from tests.processes import Processes
from tests.training.runs import assert_same_run, newest_weights
from tests.training.test_checkpoint import flip_a_bit, truncate
from tests.training.toy import ToyModel, ToyTask, toy_config, toy_fit, toy_task


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


# ---- when -----------------------------------------------------------------------------------------------------------


def test_milestones_are_saved_where_nothing_else_is_due_and_kept(tmp_path: Path):
    toy_fit(tmp_path, toy_config(save_every=12, validate_every=0, keep_every=5, keep_newest=1))
    assert steps_of(tmp_path) == [5, 10, 12]


class Clock:
    """A monotonic clock that goes on by a minute at each step, and a clock of the day that is set back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.minutes = 0
        monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + 60 * self.minutes)
        monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * self.minutes)

    def task(self) -> ToyTask:
        clock = self

        class Ticking(ToyTask):
            def step(self, *arguments: Any) -> Any:
                clock.minutes += 1
                return super().step(*arguments)

        torch.manual_seed(0)
        return Ticking(ToyModel())


def test_saving_goes_by_the_clock_also_while_the_clock_of_the_day_goes_backwards(tmp_path: Path, monkeypatch):
    config = toy_config(save_every=12, validate_every=0, save_minutes=2.5, keep_newest=12)
    toy_fit(tmp_path / "clock", config, Clock(monkeypatch).task())
    assert steps_of(tmp_path / "clock") == [3, 6, 9, 12]
    monkeypatch.undo()
    toy_fit(tmp_path / "none", toy_config(save_every=12, validate_every=0, keep_newest=12))
    assert steps_of(tmp_path / "none") == [12]
    for name, weight in newest_weights(tmp_path / "none").items():
        assert torch.equal(newest_weights(tmp_path / "clock")[name], weight)


def test_when_to_save_and_to_recompute_may_change_between_restarts(tmp_path: Path):
    toy_fit(tmp_path, toy_config(steps=3))
    changes = {"keep_every": 2, "save_minutes": 1.0, "timeout_minutes": 5.0}
    assert toy_fit(tmp_path, toy_config(**changes)).steps_done == 12
    with pytest.raises(UserError, match="checkpoint_activations=true for a model without blocks"):  # and not the config
        toy_fit(tmp_path, toy_config(checkpoint_activations=True))


# ---- activations ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.3)
        self.computed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.computed += 1
        return x + self.dropout(self.linear(x).tanh())


def test_a_run_that_recomputes_activations_is_the_same_bit_for_bit(tmp_path: Path):
    def task() -> tuple[ToyTask, list[Block]]:
        torch.manual_seed(0)
        model = ToyModel(dropout=0.3)
        blocks = [Block(), Block()]
        model.layers = nn.Sequential(*blocks, *model.layers)
        return ToyTask(model), blocks

    (plain, plain_blocks), (frugal, frugal_blocks) = task(), task()
    toy_fit(tmp_path / "plain", toy_config(accumulate=2, validate_every=0), plain)
    toy_fit(tmp_path / "frugal", toy_config(accumulate=2, validate_every=0, checkpoint_activations=True), frugal)
    assert_same_run(tmp_path / "frugal", tmp_path / "plain")
    assert [block.computed for block in plain_blocks] == [24, 24]
    assert [block.computed for block in frugal_blocks] == [48, 48]


# ---- damage ---------------------------------------------------------------------------------------------------------


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "the end of the model is missing": ("model.safetensors", truncate),
    "a byte of the optimiser is another": ("optimizer.safetensors", flip_a_bit),
    "a byte of the averages is another": ("ema.safetensors", flip_a_bit),
    "the counters are empty": ("state.json", cut_to_nothing),
    "the manifest is missing": ("manifest.json", Path.unlink),
    "the manifest is cut": ("manifest.json", truncate),
    "the folder is empty": ("", empty),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and one that was stopped after step 11; its checkpoints are those of steps 6, 8, 9 and 11."""
    folder = tmp_path_factory.mktemp("runs")
    toy_fit(folder / "whole", toy_config())
    toy_fit(folder / "cut", toy_config(), toy_task(raise_stop_at=10))
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_costs_one_interval(tmp_path: Path, runs: Path, damage: str, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "cut", run)
    name, spoil = DAMAGES[damage]
    spoil(run / "checkpoints" / "step_00000011" / name)
    task = toy_task()
    assert toy_fit(run, toy_config(), task).finished
    assert task.steps == [9, 10, 11]
    assert f"checkpoint {run / 'checkpoints' / 'step_00000011'} is damaged" in capsys.readouterr().out
    assert_same_run(run, runs / "whole")


# ---- how commands end -----------------------------------------------------------------------------------------------


def test_a_command_that_was_stopped_says_so_and_ends_with_75(monkeypatch: pytest.MonkeyPatch, capsys):
    def stopped(arguments: Any) -> Any:
        def job() -> str:
            raise Stopped("runs/photos is stopped after step 8; the same command continues")

        return job

    monkeypatch.setitem(cli.COMMANDS, "train-stage1", cli.Command("", stopped))
    assert cli.main(["train-stage1"]) == 75
    said = capsys.readouterr()
    assert said.out == "runs/photos is stopped after step 8; the same command continues\n"
    assert said.err == ""


def train_by_command(run: Path, steps: int) -> None:
    """What the command of a training does, in a process of its own."""
    config = toy_config(steps=steps, validate_every=0, save_every=100_000, workers=1, log_every=1, schedule="constant")
    cli.COMMANDS["train-stage1"] = cli.Command("", lambda _: lambda: toy_fit(run, config).summary("zellige encode"))
    sys.exit(cli.main(["train-stage1"]))


def test_sigusr1_stops_a_training_with_75_after_a_checkpoint_and_a_finished_one_ends_with_0(
    processes: Processes, tmp_path: Path
):
    process = processes.start(train_by_command, tmp_path, 1_000_000)
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and process.is_running() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.signal(signal.SIGUSR1)
    assert process.wait() == 75
    (saved,) = steps_of(tmp_path)
    processes.start(train_by_command, tmp_path, saved + 1).succeed()
    assert steps_of(tmp_path) == [saved, saved + 1]
