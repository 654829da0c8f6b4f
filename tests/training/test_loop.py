from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.errors import UserError
from common.layout import lies_place_after_place
from common.model_io import load_pretrained
from tests.processes import Processes
from tests.training.toy import ToyData, ToyModel, ToyTask, toy_command, toy_config, toy_fit, toy_program, toy_task
from training.loop import FitResult, fit, in_words
from training.optimizers import OptimizerSettings, make_optimizer
from training.task import Batch, StepOutput
from training.trainer import Trainer


def metrics(run: Path, split: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def newest_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


def assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit: weights of the best and of the last step, optimiser, counters and metrics."""
    names = ["metrics.jsonl", "model/model.safetensors", "model/config.json"]
    last = max((other / "checkpoints").iterdir()).name
    names += [f"checkpoints/{last}/{path.name}" for path in (other / "checkpoints" / last).iterdir()]
    differing = [name for name in names if (run / name).read_bytes() != (other / name).read_bytes()]
    assert differing == []
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in other.iterdir())


def assert_close_runs(run: Path, other: Path, tolerance: float) -> None:
    for split in ("train", "validation"):
        for line, expected in zip(metrics(run, split), metrics(other, split), strict=True):
            for name in {"loss", "grad_norm"} & expected.keys():
                assert line[name] == pytest.approx(expected[name], abs=tolerance)
    for name, expected in newest_weights(other).items():
        torch.testing.assert_close(newest_weights(run)[name], expected, rtol=0, atol=tolerance)


# ---- groups ------------------------------------------------------------------------------------------------


class ThreeShapes(ToyData):
    """Toy samples of which only those with equal remainders by 3 may share a batch."""

    def __init__(self, size: int, noise: float = 0.0):
        super().__init__(size, noise)
        self.groups = np.arange(size) % 3

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        assert len({index % 3 for index in indices}) == 1
        return super().fetch(indices, draws)


def fit_three_shapes(run: Path, **changes: Any) -> FitResult:
    config, task = toy_config(ema_decay=0, schedule="constant", **changes), toy_task()
    return fit(task, ThreeShapes(37, 0.1), ThreeShapes(13), config, run, {"train": asdict(config)})


def test_batches_of_training_and_validation_are_of_one_group(tmp_path: Path):
    result = fit_three_shapes(tmp_path, validate_every=12)
    model, held_out = load_pretrained(tmp_path, {"toy": ToyModel}), ToyData(13)
    batch = held_out.fetch(range(13), range(13))
    expected = (model(batch["x"]) - batch["y"]).square().mean().item()  # over all of them, in whatever batches
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_over_groups_continues_as_if_it_had_not_been_interrupted(tmp_path: Path):
    fit_three_shapes(tmp_path / "whole")
    fit_three_shapes(tmp_path / "cut", steps=7, save_every=7)
    fit_three_shapes(tmp_path / "cut")
    for name, tensor in newest_weights(tmp_path / "whole").items():
        torch.testing.assert_close(newest_weights(tmp_path / "cut")[name], tensor, rtol=0, atol=0)


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


# ---- the first lines -----------------------------------------------------------------------------------------------


def test_the_first_line_says_what_is_trained_on_what(tmp_path: Path, capsys):
    toy_fit(tmp_path, toy_config(steps=6))
    toy_fit(tmp_path, toy_config())
    first, again = (line for line in capsys.readouterr().out.splitlines() if "held out" in line)
    # 4 * 16 + 16, twice 16 of the norm, 16 + 1; 6 steps of 8 samples are 48 of 37.
    assert first.endswith(": 37 images and 13 held out, 129 parameters, 6 steps of 8 are 1.3 epochs")
    assert first.startswith("on ")
    assert again.endswith("12 steps of 8 are 2.6 epochs; continuing from step 6, 6 are left")


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (950, "950"),
        (1200, "1.2 thousand"),
        (31_400, "31 thousand"),
        (9_900_000, "9.9 million"),
        (2 * 10**10, "20 billion"),
    ],
)
def test_counts_as_people_say_them(count: int, words: str):
    assert in_words(count) == words


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


# ---- what a step sees --------------------------------------------------------------------------------------


def fit_parts(run: Path, **changes: Any) -> FitResult:
    return toy_fit(run, toy_config(log_every=1, **changes))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_equal_one_batch_also_across_epochs(tmp_path: Path, accumulate: int):
    # 37 samples, batches of 8: steps 5 and 10 hold the end of an epoch. Tolerance: float32 sums in another order.
    fit_parts(tmp_path / "one")
    fit_parts(tmp_path / "parts", accumulate=accumulate)
    assert_close_runs(tmp_path / "parts", tmp_path / "one", tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(processes: Processes, tmp_path: Path, accumulate: int):
    # Tolerance: gradients are summed in another order, and 12 steps of Adam add to that.
    fit_parts(tmp_path / "one", batch_size=8)
    config = {"log_every": 1, "batch_size": 8, "accumulate": accumulate}
    said = processes.together(toy_program, tmp_path / "two", config)
    assert [text.count("validation: loss") for text in said] == [3, 0]  # the main process speaks, the other is silent
    assert_close_runs(tmp_path / "two", tmp_path / "one", tolerance=1e-5)


def test_workers_change_nothing(tmp_path: Path):
    toy_fit(tmp_path / "a", toy_config())
    toy_fit(tmp_path / "b", toy_config(workers=2))
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_start_sees_the_micro_batches_of_the_first_step_and_the_first_step_still_does(tmp_path: Path):
    task = toy_task()
    toy_fit(tmp_path, toy_config(steps=2, accumulate=2), task=task)
    assert [batch["draws"].tolist() for batch in task.started] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert task.seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_batch_that_cannot_be_shared_is_refused_before_the_first_step():
    with pytest.raises(UserError, match="choose a multiple"):
        toy_config(batch_size=9, accumulate=2)


# ---- numbers that are not finite ---------------------------------------------------------------------------


def test_a_nan_is_skipped_counted_and_leaves_no_trace(tmp_path: Path):
    task = toy_task(nan_draws=[19])  # in the third step
    result = toy_fit(tmp_path, toy_config(log_every=1), task=task)
    lines = metrics(tmp_path, "train")
    assert [line["skipped_steps"] for line in lines[:4]] == [0, 0, 1, 1]
    assert "loss" not in lines[2]
    assert "input_mean_norm" not in lines[2]
    assert "input_mean_norm" in lines[3]
    assert task.discarded == 1
    assert result.steps_done == 12
    assert all(weight.isfinite().all() for weight in newest_weights(tmp_path).values())


def test_the_task_is_given_the_number_of_the_step_which_counts_skipped_ones(tmp_path: Path):
    task = toy_task(nan_draws=[19], raise_stop_at=8)  # in the third step; stopped after the fourth
    toy_fit(tmp_path, toy_config(accumulate=2), task=task)
    toy_fit(tmp_path, toy_config(accumulate=2), task=(other := toy_task()))
    assert task.steps + other.steps == [step for step in range(12) for _ in range(2)]
    assert task.ended + other.ended == [step for step in range(12) if step != 2]


def test_a_skipped_step_changes_no_weights(tmp_path: Path):
    toy_fit(tmp_path / "a", toy_config(steps=2, schedule="constant"))
    task = toy_task(nan_draws=[17])
    toy_fit(tmp_path / "b", toy_config(steps=3, schedule="constant"), task=task)
    for name, weight in newest_weights(tmp_path / "a").items():
        assert torch.equal(newest_weights(tmp_path / "b")[name], weight)


def test_one_poisoned_micro_batch_poisons_its_step_only(tmp_path: Path):
    task = toy_task(nan_draws=[16])
    toy_fit(tmp_path, toy_config(accumulate=4), task=task)
    assert task.discarded == 1
    assert metrics(tmp_path, "train")[-1]["skipped_steps"] == 1


def test_too_many_in_a_row_stop_with_the_last_good_checkpoint(tmp_path: Path):
    config = toy_config(max_nonfinite_steps=3, validate_every=0)
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 9.*step_00000006; .* lower train.learning_rate"):
        toy_fit(tmp_path, config, task=toy_task(nan_draws=range(48, 200)))


def test_single_ones_do_not_add_up(tmp_path: Path):
    task = toy_task(nan_draws=range(0, 96, 16))
    result = toy_fit(tmp_path, toy_config(max_nonfinite_steps=2), task=task)
    assert result.finished
    assert task.discarded == 6


def test_a_large_gradient_is_passed_over_and_counted(tmp_path: Path):
    """Of a norm that some steps have and others have not: weights are then those of a run without the former."""
    toy_fit(tmp_path / "all", toy_config(steps=12, log_every=1, learning_rate=1e-9))
    norms = [line["grad_norm"] for line in metrics(tmp_path / "all", "train")]
    limit = sorted(norms)[8]  # of 12: three are above
    config = toy_config(steps=12, log_every=1, learning_rate=1e-9, skip_grad_norm=limit * 1.0001)
    task = toy_task()
    toy_fit(tmp_path / "some", config, task=task)
    lines = metrics(tmp_path / "some", "train")
    above = [norm > limit * 1.0001 for norm in norms]
    assert sum(above) == 3
    assert [line["large_gradients"] for line in lines] == [sum(above[: step + 1]) for step in range(12)]
    assert lines[-1]["skipped_steps"] == task.discarded == 3
    assert task.ended == [step for step in range(12) if not above[step]]


def test_gradients_that_stay_too_large_stop_the_run_with_advice(tmp_path: Path):
    """The average of the weights stays as it is too."""
    config = toy_config(skip_grad_norm=1e-6, max_nonfinite_steps=5, ema_decay=0.5)
    advice = (
        r"5 steps in a row, up to step 5, .* norms, [\d.]+ and more, .*skip_grad_norm=1e-06.*larger train.skip_grad"
    )
    with pytest.raises(UserError, match=advice):
        toy_fit(tmp_path, config)


# ---- validation, the best weights, the end -----------------------------------------------------------------


def test_the_model_folder_holds_the_average_of_the_best_step(tmp_path: Path):
    result = toy_fit(tmp_path, toy_config(save_every=100))
    best = min(metrics(tmp_path, "validation"), key=lambda line: line["loss"])
    assert (result.best_step, result.best_value) == (best["step"], best["loss"])
    ema = load_file(tmp_path / "checkpoints" / f"step_{best['step']:08d}" / "ema.safetensors")
    raw = load_file(tmp_path / "checkpoints" / f"step_{best['step']:08d}" / "model.safetensors")
    assert all(torch.equal(weights(tmp_path)[name], ema[name]) for name in ema)
    assert not torch.equal(ema["layers.0.weight"], raw["layers.0.weight"])
    data, model = ToyData(13), load_pretrained(tmp_path, {"toy": ToyModel})
    batch = data.fetch(range(13), range(13))
    with torch.no_grad():
        assert float((model(batch["x"]) - batch["y"]).square().mean()) == pytest.approx(best["loss"], abs=1e-6)


def test_without_average_or_validation_the_last_weights_are_the_model(tmp_path: Path):
    result = toy_fit(tmp_path, toy_config(validate_every=0, ema_decay=0.0))
    assert (result.best_step, result.metrics) == (None, {})
    assert all(torch.equal(weights(tmp_path)[name], w) for name, w in newest_weights(tmp_path).items())


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path):
    config = toy_config(steps=400, learning_rate=0.5, schedule="constant", validate_every=2, patience=3, save_every=400)
    result = toy_fit(tmp_path, config)
    assert (result.stopped_by, result.finished) == ("patience", True)
    assert result.steps_done == result.best_step + 6 < 400
    again = toy_fit(tmp_path, config)
    assert (again.stopped_by, again.steps_done) == ("patience", result.steps_done)


def test_the_mean_over_held_out_samples_is_exact_for_any_batch(tmp_path: Path):
    task, data = toy_task(), ToyData(13)
    batch = data.fetch(range(13), range(13))
    with torch.no_grad():
        expected = float((task.model.eval()(batch["x"]) - batch["y"]).square().double().mean())
    for batch_size in (4, 13, 26):  # 13 samples: a short last batch, a full one, and less than one
        trainer = Trainer(task, ToyData(37), data, toy_config(batch_size=batch_size), tmp_path)
        trainer.validate()
        assert trainer.progress.validation["loss"] == pytest.approx(expected, abs=1e-6)


# ---- precision, clipping, accelerate's global state --------------------------------------------------------


def test_bfloat16_trains_float32_weights_and_differs_from_float32(tmp_path: Path):
    toy_fit(tmp_path / "float32", toy_config(steps=40))
    task = toy_task()
    seen = []
    task.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    toy_fit(tmp_path / "bfloat16", toy_config(steps=40, precision="bf16"), task=task)
    assert set(seen) == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 for weight in task.model.parameters())
    assert task.model(torch.zeros(1, 4)).dtype == torch.float32  # the loop leaves the model as it was
    half, full = (metrics(tmp_path / name, "validation")[-1]["loss"] for name in ("bfloat16", "float32"))
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_runs_of_different_precision_and_accumulation_in_one_process(tmp_path: Path):
    toy_fit(tmp_path / "a", toy_config(steps=4))
    toy_fit(tmp_path / "b", toy_config(steps=4, precision="bf16", accumulate=2))
    toy_fit(tmp_path / "c", toy_config(steps=4))
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "c" / "metrics.jsonl").read_bytes()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_float16_needs_a_gpu(tmp_path: Path):
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        toy_fit(tmp_path, toy_config(precision="fp16"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_gpu_learns_resumes_and_recovers_from_overflow(tmp_path: Path, precision: str):
    config = toy_config(steps=60, precision=precision, validate_every=20)
    toy_fit(tmp_path, config, task=toy_task(raise_stop_at=30))
    result = toy_fit(tmp_path, config)
    losses = [line["loss"] for line in metrics(tmp_path, "train") if "loss" in line]
    assert result.finished
    assert losses[-1] < losses[0]


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.setup.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracker=wandb is not installed: pip install wandb"):
        toy_fit(tmp_path, toy_config(tracker="wandb"))


def test_clipping_bounds_the_update_but_reports_the_norm(tmp_path: Path):
    # Adam ignores the gradient's scale, so compare its second moment after one step: it is (1 - beta2) * gradient^2.
    norms = {}
    for clip in (0.0, 1e-3):
        run = tmp_path / str(clip)
        toy_fit(run, toy_config(steps=1, log_every=1, max_grad_norm=clip))
        state = load_file(run / "checkpoints" / "step_00000001" / "optimizer.safetensors")
        squares = sum(float(value.sum()) for name, value in state.items() if name.startswith("exp_avg_sq/"))
        norms[clip] = (metrics(run, "train")[0]["grad_norm"], math.sqrt(squares / (1 - 0.999)))
    assert norms[0.0][1] == pytest.approx(norms[0.0][0], rel=1e-3)
    assert norms[1e-3] == pytest.approx((norms[0.0][0], 1e-3), rel=1e-2)


def test_weight_decay_spares_biases_and_norms(tmp_path: Path):
    task = toy_task()
    before = {name: weight.detach().clone() for name, weight in task.model.named_parameters()}
    data = ToyData(37)
    data.x.zero_()
    config = toy_config(steps=1, weight_decay=1.0, learning_rate=0.1, schedule="constant", validate_every=0)
    toy_fit(tmp_path, config, task=task, train=data)
    # Inputs are zero: the first weight gets no gradient, and only decay moves it.
    torch.testing.assert_close(task.model.layers[0].weight, before["layers.0.weight"] * 0.9)
    assert torch.equal(task.model.layers[1].weight, before["layers.1.weight"]) is False  # has a gradient
    moved = (task.model.layers[1].weight - before["layers.1.weight"]).abs().max()
    assert moved <= 0.1 + 1e-6  # Adam's first step is the learning rate: no decay on top


def test_what_has_one_number_for_each_channel_does_not_decay():
    shapes = [(3,), (8, 1, 1, 1), (1, 8, 1, 1), (8, 4), (8, 4, 3, 3), (1,), ()]
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make_optimizer(weights, OptimizerSettings(weight_decay=0.1), 1e-3)
    decays = {tuple(w.shape): group["weight_decay"] > 0 for group in optimizer.param_groups for w in group["params"]}
    assert decays == {shape: shape in [(8, 4), (8, 4, 3, 3)] for shape in shapes}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_trains_as_plain_and_saves_the_same_names(tmp_path: Path):
    toy_fit(tmp_path / "plain", toy_config())
    toy_fit(tmp_path / "compiled", toy_config(compile=True))
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    assert_close_runs(tmp_path / "compiled", tmp_path / "plain", tolerance=1e-4)


def test_tensorboard_has_the_curves_and_the_previews(tmp_path: Path):
    pytest.importorskip("tensorboard")
    toy_fit(tmp_path, toy_config(steps=4, tracker="tensorboard", preview_every=2))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(tag in content for tag in (b"train/loss", b"validation/loss", b"train/images_per_second", b"preview"))
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == [
        "step_00000002.png",
        "step_00000004.png",
    ]


@pytest.mark.parametrize("asked", [False, True])
def test_channels_last_lays_maps_place_after_place_for_training(tmp_path: Path, asked: bool):
    seen: list[bool] = []

    class Looking(ToyTask):
        def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
            seen.append(lies_place_after_place(batch["maps"]))
            return super().step(model, batch, step)

    class WithMaps(ToyData):
        def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
            return {**super().fetch(indices, draws), "maps": torch.ones(len(indices), 3, 4, 5)}

    toy_fit(tmp_path, toy_config(steps=2, channels_last=asked), Looking(ToyModel()), WithMaps(37))
    assert seen == [asked, asked]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tf32_without_a_gpu_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="precision=tf32 on cpu, expected an NVIDIA GPU"):
        toy_fit(tmp_path, toy_config(precision="tf32"))
