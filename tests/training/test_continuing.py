from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from tests.processes import Processes
from tests.training.runs import assert_same_run, newest_weights
from tests.training.toy import ToyData, ToyModel, ToyTask, toy_command, toy_config, toy_fit, toy_task
from training.task import Batch
from training.trainer import Trainer

# ---- killed and continued ----------------------------------------------------------------------------------


def train_until_killed(run: Path, dropout: float, events: int) -> None:
    """Trains in a process that gets SIGKILL at its `events`-th fetch of data, flush or move of a file."""
    left = events

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return count

    os.replace, os.fsync, shutil.rmtree = counted(os.replace), counted(os.fsync), counted(shutil.rmtree)
    ToyData.fetch = counted(ToyData.fetch)
    toy_fit(run, toy_config(), toy_task(dropout))


def test_killed_and_continued_is_uninterrupted_bit_for_bit(processes: Processes, tmp_path: Path):
    # Dropout and noisy data: random numbers must not depend on where the run was cut either.
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_fit(whole, toy_config(), toy_task(0.3))
    kills = 0
    for events in (
        2,
        17,
        11,
        36,
        23,
        41,
        28,
        57,
        10_000,
    ):  # in fetches, flushes and both moves of atomic writes
        code = processes.start(train_until_killed, cut, 0.3, events).wait()
        kills += code == -signal.SIGKILL
    assert code == 0
    assert kills >= 5
    assert_same_run(cut, whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    first = toy_fit(tmp_path, toy_config())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    task = toy_task()
    again = toy_fit(tmp_path, toy_config(), task=task)
    assert (again.finished, again.steps_done, again.metrics) == (True, 12, first.metrics)
    assert task.seen == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_more_steps_continue_a_finished_run(tmp_path: Path):
    toy_fit(tmp_path / "a", toy_config(steps=6, schedule="constant"))
    toy_fit(tmp_path / "a", toy_config(steps=12, schedule="constant"))
    toy_fit(tmp_path / "b", toy_config(steps=12, schedule="constant"))
    assert torch.equal(
        newest_weights(tmp_path / "a")["layers.0.weight"], newest_weights(tmp_path / "b")["layers.0.weight"]
    )


def test_a_damaged_checkpoint_is_passed_over_in_one_line_and_the_run_is_the_same(tmp_path: Path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_fit(whole, toy_config())
    task = toy_task(raise_stop_at=10)
    toy_fit(cut, toy_config(), task=task)
    newest = max((cut / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-50])
    capsys.readouterr()
    toy_fit(cut, toy_config())
    lines = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert f"checkpoint {newest} is damaged" in lines[0]
    assert lines[0].endswith("continuing from step 9")
    assert_same_run(cut, whole)


def test_no_good_checkpoint_left_is_an_error(tmp_path: Path):
    toy_fit(tmp_path, toy_config())
    for path in (tmp_path / "checkpoints").rglob("manifest.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        toy_fit(tmp_path, toy_config())


def test_another_config_is_refused_by_name(tmp_path: Path):
    toy_fit(tmp_path, toy_config(steps=3))
    with pytest.raises(UserError, match=r"train.learning_rate was 0.01 and is now 0.02; .* another --run folder"):
        toy_fit(tmp_path, toy_config(steps=3, learning_rate=0.02))


def test_a_full_disk_is_one_sentence_and_the_run_continues_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_fit(whole, toy_config())
    from training import checkpoint

    def full_at_step_9(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_00000009" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    real = checkpoint.save_tensors
    monkeypatch.setattr(checkpoint, "save_tensors", full_at_step_9)
    with pytest.raises(UserError, match=r"the disk is full: .*step_00000009 was not written"):
        toy_fit(cut, toy_config())
    assert max(path.name for path in (cut / "checkpoints").iterdir()) == "step_00000008"
    assert not list(cut.rglob("*.tmp"))
    monkeypatch.undo()
    toy_fit(cut, toy_config())
    assert_same_run(cut, whole)


# ---- signals -----------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_step_saves_and_says_how_to_continue(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/env/bin/zellige", "train-stage1", "--run", "toy"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_fit(whole, toy_config())
    result = toy_fit(cut, toy_config(), task=toy_task(raise_stop_at=7))
    assert (result.steps_done, result.finished, result.stopped_by) == (8, False, "signal")
    out = capsys.readouterr().out
    assert "SIGTERM: step 8 is done and saved" in out
    assert "continue with: zellige train-stage1 --run toy" in out
    assert toy_fit(cut, toy_config()).finished
    assert_same_run(cut, whole)


@pytest.mark.parametrize(("signalled_in", "ends_at"), [(7, 8), (11, 12)])  # step 8 has a validation, 12 is the last
def test_a_signal_in_the_step_of_a_due_validation_saves_at_once(
    tmp_path: Path, capsys, monkeypatch, signalled_in: int, ends_at: int
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_fit(whole, toy_config(preview_every=4))
    events: list[tuple[str, int]] = []
    for name in ("validate", "save"):
        real = getattr(Trainer, name)

        def noted(trainer: Trainer, *given: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            events.append((name, trainer.progress.step))
            return real(trainer, *given)

        monkeypatch.setattr(Trainer, name, noted)
    result = toy_fit(cut, toy_config(preview_every=4), task=toy_task(raise_stop_at=signalled_in))
    assert (result.steps_done, result.finished, result.stopped_by) == (ends_at, False, "signal")
    assert events[-1] == ("save", ends_at)
    assert ("validate", ends_at) not in events
    assert f"step {ends_at} is done and saved; what is due after it comes first next time" in capsys.readouterr().out
    events.clear()
    again = toy_fit(cut, toy_config(preview_every=4))
    assert events[0] == ("validate", ends_at)
    assert (again.finished, again.stopped_by) == (True, "steps")
    assert_same_run(cut, whole)
    assert {path.name for path in (cut / "previews").iterdir()} == {
        path.name for path in (whole / "previews").iterdir()
    }


def test_a_signal_during_a_validation_ends_it_and_saves(tmp_path: Path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_fit(whole, toy_config())
    validated: list[int] = []

    class Interrupted(ToyTask):
        def validate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            validated.append(len(self.seen))
            if validated == [4, 4, 8]:  # the first of two batches of the second validation
                os.kill(os.getpid(), signal.SIGTERM)
            return super().validate(model, batch)

    torch.manual_seed(0)
    result = toy_fit(cut, toy_config(), task=Interrupted(ToyModel()))
    assert validated == [4, 4, 8]
    assert (result.steps_done, result.finished, result.stopped_by) == (8, False, "signal")
    assert max(path.name for path in (cut / "checkpoints").iterdir()) == "step_00000008"
    assert toy_fit(cut, toy_config()).finished
    assert_same_run(cut, whole)


def test_a_signal_in_the_last_step_of_a_run_that_owes_nothing_ends_it(tmp_path: Path):
    result = toy_fit(tmp_path, toy_config(validate_every=0), task=toy_task(raise_stop_at=11))
    assert (result.steps_done, result.finished, result.stopped_by) == (12, True, "steps")


def test_a_real_sigint_to_a_real_process_ends_it_with_exit_code_75(processes: Processes, tmp_path: Path):
    config = {"steps": 100_000, "workers": 1, "validate_every": 0, "save_every": 1000}
    process = processes.start(toy_command, tmp_path, config)
    process.wait_for("step 2/")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the data loader's workers too
    assert process.wait() == 75
    out = process.stdout
    assert "continue with: python" in out
    done = int(out.splitlines()[-1].removeprefix("stopped by signal after "))
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == f"step_{done:08d}"
    assert (tmp_path / "model" / "model.safetensors").exists()  # nothing was validated: the last weights
