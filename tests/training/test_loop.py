from __future__ import annotations

import math
import multiprocessing
import shutil
from collections.abc import Sequence
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
from tests.training.runs import assert_close_runs, metrics, newest_weights, weights
from tests.training.toy import ToyData, ToyModel, ToyTask, toy_config, toy_fit, toy_program, toy_task
from training.loop import FitResult, fit, in_words
from training.optimizers import Learner, OptimizerSettings, make_optimizer
from training.task import Batch, StepOutput
from training.trainer import Trainer

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


def test_validations_have_the_same_workers_and_leave_none(tmp_path: Path):
    task, seen = toy_task(), list[set[multiprocessing.process.BaseProcess]]()
    before, validate = set(multiprocessing.active_children()), task.validate
    task.validate = lambda *given: (seen.append(set(multiprocessing.active_children()) - before), validate(*given))[1]
    toy_fit(tmp_path, toy_config(steps=8, validate_every=2, workers=1), task=task)
    assert len(seen) == 8  # four validations of two batches
    assert len(set.union(*seen)) == 2  # one for the steps, one for all validations
    assert set(multiprocessing.active_children()) == before


def test_start_sees_the_micro_batches_of_the_first_step_and_the_first_step_still_does(tmp_path: Path):
    task = toy_task()
    toy_fit(tmp_path, toy_config(steps=2, accumulate=2), task=task)
    assert [batch["draws"].tolist() for batch in task.started] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert task.seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_batch_that_cannot_be_shared_is_refused_before_the_first_step():
    with pytest.raises(UserError, match="choose a multiple"):
        toy_config(batch_size=9, accumulate=2)


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


def test_without_a_bound_gradients_stay_as_they_are_and_the_norm_is_the_same():
    torch.manual_seed(0)
    learner, bounded = (
        Learner(nn.Linear(3, 2), OptimizerSettings(max_grad_norm=bound), lambda step: 0.1) for bound in (0.0, 1e9)
    )
    for one in (learner, bounded):
        for number, weight in enumerate(one.weights):
            weight.grad = torch.full_like(weight, 0.1 + number)
    versions = [weight.grad._version for weight in learner.weights]
    assert torch.equal(learner.clip(None), bounded.clip(None))
    assert [weight.grad._version for weight in learner.weights] == versions  # nothing was written


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
