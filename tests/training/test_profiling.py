"""Steps of a training taken apart, and what is advised."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from common.tensor_files import save_tensors
from tests.training.test_where_time_goes import SleepyData
from tests.training.toy import ToyData, ToyModel, ToyTask, toy_config
from training.advice import Compared, advice, largest_micro_batch, table
from training.loop import fit, in_place_of_training
from training.metrics_log import COMMUNICATION, PREVIEWS, SAVING, VALIDATION, WAITING
from training.optimizers import OptimizerSettings
from training.profiled_memory import Kept
from training.profiling import (
    BACKWARD,
    FIGURES,
    FORWARD,
    OPTIMISER,
    Between,
    Fetching,
    Measured,
    Profiler,
    tell_communication,
)
from training.task import Companion, StepOutput

CONFIG = toy_config(validate_every=10, preview_every=20, save_every=5, steps=1000)


class SlowLayers(nn.Sequential):
    def forward(self, x):
        time.sleep(0.01)
        return super().forward(x)


class BusyTask(ToyTask):
    """Has a companion that learns; and every part of a step that a test asks about sleeps."""

    def __init__(self, model: ToyModel) -> None:
        super().__init__(model)
        self.critic = nn.Linear(4, 1)
        self.companions = {"critic": Companion(self.critic, OptimizerSettings(), lambda step: 1e-3)}

    def step(self, model, batch, step):
        output = super().step(model, batch, step)
        return StepOutput(output.loss, output.metrics, {"critic": self.critic(batch["x"]).square().mean()})

    def validate(self, model, batch):
        time.sleep(0.01)
        return super().validate(model, batch)


def profiled(run: Path, task=None, data=None, config=CONFIG, steps=4, **options) -> Measured:
    torch.manual_seed(0)
    profiler = Profiler(steps, 0.5, **options)
    task = task or ToyTask(ToyModel())
    with in_place_of_training(profiler.fit):
        result = fit(task, data or ToyData(37), ToyData(80), config, run, {"train": asdict(config)})
    assert result.finished
    assert profiler.measured is not None
    return profiler.measured


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Measured:
    model = ToyModel()
    model.layers = SlowLayers(*model.layers)
    return profiled(tmp_path_factory.mktemp("busy"), BusyTask(model), config=replace(CONFIG, accumulate=2))


def test_the_parts_of_a_step_are_told_apart_and_add_up(busy):
    assert sum(busy.shares.values()) == pytest.approx(1)
    assert busy.step_seconds == pytest.approx(sum(busy.seconds_of_steps) / 4, rel=0.2)
    assert busy.step[f"{FORWARD}: layers"] >= 0.02  # of two micro-batches
    assert {
        f"{FORWARD}: critic",
        f"{BACKWARD}: critic",
        f"{OPTIMISER}: critic",
        BACKWARD,
        OPTIMISER,
    } <= busy.step.keys()
    assert busy.within(FORWARD) == sum(seconds for name, seconds in busy.step.items() if name.startswith(FORWARD))
    assert busy.first_step == 500
    assert busy.micro_batch == 4


def test_what_is_done_between_steps_is_done_once_and_counts_as_often_as_it_is_due(busy):
    assert {name: one.every for name, one in busy.between.items()} == {VALIDATION: 10, PREVIEWS: 20, SAVING: 5}
    assert busy.between[VALIDATION].seconds >= 0.9 * 20 * 0.01  # of 80 samples, of which 4 batches of 4 were looked at
    assert busy.shares[SAVING] == pytest.approx(busy.between[SAVING].seconds / 5 / busy.wall_seconds)


def test_memory_is_that_of_weights_gradients_moments_averages_and_what_is_kept(busy):
    weights = sum(weight.numel() for weight in ToyModel().parameters())
    assert busy.memory["weights"] == 4 * (weights + 8)  # and two buffers
    assert busy.memory["gradients"] == 4 * weights
    assert 8 * weights <= busy.memory["optimiser"] <= 8 * weights + 100  # two moments, and counters
    assert busy.memory["averaged weights"] == busy.memory["weights"]
    assert 4 * 5 * 4 <= busy.memory["critic"] <= 4 * 5 * 4 + 100
    assert busy.activations > 0


def test_what_the_backward_pass_needs_is_counted_once_and_weights_are_not():
    layer, x = nn.Linear(100, 100), torch.randn(10, 100)

    class Squares:
        def step(self):
            return layer(x).square().sum()

    task, kept = Squares(), Kept(list(layer.parameters()))
    with kept.counted(task):
        task.step()
    assert kept.bytes == 2 * 4 * 1000  # x, and what is squared


def test_a_measured_training_runs_as_any_other_afterwards(tmp_path):
    task = ToyTask(ToyModel())
    profiled(tmp_path / "a", task, between=False)
    assert "step" not in vars(task)
    result = fit(task, ToyData(37), ToyData(13), toy_config(steps=2), tmp_path / "b", {})
    assert result.steps_done == 2


def test_a_checkpoint_beside_the_steps_is_written_when_a_measurement_ends(tmp_path: Path, monkeypatch):
    """Its folder is removed then."""

    def slowly(*arguments):
        time.sleep(0.1)
        save_tensors(*arguments)

    monkeypatch.setattr("training.checkpoint.save_tensors", slowly)
    profiled(tmp_path, config=replace(CONFIG, save_in_background=True, validate_every=0, preview_every=0))
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert (checkpoint / "manifest.json").is_file()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_data_set_is_waited_for_and_workers_are_advised(tmp_path, workers):
    measured = profiled(
        tmp_path, data=SleepyData(37), config=replace(CONFIG, workers=workers, prefetch=2), between=False
    )
    assert measured.shares[WAITING] > 0.5
    assert measured.fetching.seconds >= 0.05
    assert sum(measured.fetching.parts.values()) == pytest.approx(1)
    first = advice(replace(measured, cores=16))[0]
    assert first.startswith("waiting for data takes ")
    assert "--train.workers " in first


def made(**changes) -> Measured:
    step = {WAITING: 0.001, FORWARD: 0.04, f"{FORWARD}: encoder": 0.01, BACKWARD: 0.05, FIGURES: 0.001}
    values = {
        "device": "NVIDIA", "samples": "images", "processes": 1, "train": toy_config(batch_size=64, workers=2),
        "micro_batch": 64, "first_step": 0, "skipped_steps": 0, "seconds_of_steps": [0.1] * 4, "step": step,
        "between": {SAVING: Between(1.0, 10_000)}, "fetching": Fetching(0.02, {"decoding": 0.7, "the rest": 0.3}),
        "memory": {"weights": 10**9, "gradients": 10**9}, "activations": 3 * 10**9, "peak": 10 * 10**9,
        "capacity": 20 * 10**9, "host_waits": 0.5, "cores": 16, "threads": 8,
    }  # fmt: skip
    return Measured(**{**values, **changes})


def with_step(**seconds: float) -> dict[str, float]:
    return {**made().step, **seconds}


def test_advice_follows_the_table():
    waiting = with_step(**{WAITING: 0.2})
    slow = Fetching(0.4, {"decoding": 0.7, "the rest": 0.3})
    line = advice(made(step=waiting, fetching=slow))[0]
    assert "give --train.workers 6; a step computes for 101 ms, and its batch takes a worker 400 ms; decoding" in line
    assert "smaller image files" in line
    line = advice(made(step=waiting, cores=2))[0]
    assert "20 ms; decoding takes most" in line
    assert "among the others 602" in line
    assert "6 workers would be needed, and there are 2 cores for 1 process" in line
    itself = made(step=waiting, fetching=slow, train=toy_config(batch_size=64, workers=0))
    assert "fetches its batches itself: give --train.workers 4" in advice(itself)[0]
    exchange = advice(made(step=with_step(**{COMMUNICATION: 0.1}), processes=2))
    assert any("1.0 GB in each step, for 49%" in line and "--train.batch_size" in line for line in exchange)
    assert "--compare train.precision=bf16 --compare train.compile=true" in advice(made())[0]
    bf16 = made(train=toy_config(batch_size=64, precision="bf16", compile=True))
    assert "--compare" not in advice(bf16)[0]
    assert "the GPU waits for the host" in advice(made(host_waits=0.01))[0]
    assert "on 1 of 16 cores: OMP_NUM_THREADS=16" in advice(made(device="cpu", threads=1, capacity=None))[0]
    idle = made(step={FORWARD: 0.01, OPTIMISER: 0.09}, capacity=None)
    assert advice(idle) == ["nothing takes so much that a setting would change it"]


def test_what_is_done_too_often_is_told_with_how_often_it_may_be():
    rare = made(between={VALIDATION: Between(10.0, 100)})
    line = advice(rare)[0]
    assert line.startswith("validation: 50%, 10 s each time; --train.validate_every ")
    every = int(line.partition("validate_every ")[2].split()[0])
    assert made(between={VALIDATION: Between(10.0, every)}).shares[VALIDATION] == pytest.approx(0.05, rel=0.05)


def test_room_for_a_larger_batch_is_what_the_device_has_left():
    assert largest_micro_batch(made()) == int((18e9 - 2e9) / (8e9 / 64))
    split = made(train=toy_config(batch_size=256, accumulate=4))
    assert "--train.accumulate 2 " in advice(split)[-1]
    assert "100% full: --train.accumulate 2 " in advice(made(peak=20 * 10**9))[-1]


def test_a_comparison_says_when_the_recipe_differs_as_much_from_itself():
    assert Compared("train.precision=bf16", 1.4, 0.6, 0.1).verdict == "1.40 times the speed, with 0.60 times the memory"
    assert "no more than" in Compared("train.compile=true", 1.04, None, 0.05).verdict
    lines = advice(made(), [Compared("train.precision=bf16", 1.4, None, 0.1)])
    assert lines[1] == "compared: --train.precision bf16: 1.40 times the speed"
    assert "train.precision=bf16" not in lines[0]


def test_the_table_has_all_shares():
    lines = table(made(between={VALIDATION: Between(2.0, 1000)})).splitlines()
    shown = {line.split("  ")[0]: line.split()[-1] for line in lines if line.endswith("%")}
    assert shown["forward"] == "48.1%"
    assert shown["validation, 2 s each 1,000 steps"] == "1.9%"
    assert shown["all"] == "100.0%"
    assert any(line.split()[:3] == ["of", "that", "encoder"] for line in lines)


def test_the_exchange_is_no_longer_counted_as_the_backward_pass():
    step = {BACKWARD: 0.5, WAITING: 0.1}
    tell_communication(step, 0.3, 0.2)  # and 0.1 of it are another process's waiting for data
    assert step == {BACKWARD: pytest.approx(0.2), COMMUNICATION: pytest.approx(0.2), WAITING: pytest.approx(0.2)}
