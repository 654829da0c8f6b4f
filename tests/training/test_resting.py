"""Weights that some steps do not move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Processes
from tests.training.runs import assert_close_runs, assert_same_run
from tests.training.toy import ToyTask, toy_config, toy_fit, toy_program, toy_task


class Watching(ToyTask):
    """Keeps a copy of the weights after each step."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.history: list[dict[str, torch.Tensor]] = [self.copy()]

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.history.append(self.copy())


def newest(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / f"{name}.safetensors")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resting_weights_stay_and_the_others_learn(tmp_path: Path, accumulate: int):
    task = Watching(toy_task().model, first_every=3)
    toy_fit(tmp_path, toy_config(accumulate=accumulate, weight_decay=0.1), task)
    for step in range(12):
        before, after = task.history[step], task.history[step + 1]
        for name in before:
            moved = not torch.equal(before[name], after[name])
            assert moved == (not name.startswith("layers.0.") or step % 3 == 0), (step, name)
    counts = {name: int(value) for name, value in newest(tmp_path, "optimizer").items() if name.startswith("step/")}
    assert counts == {name: 4 if ".0." in name else 12 for name in counts}
    assert any(".0." in name for name in counts)


def test_the_norm_that_is_clipped_is_that_of_what_learns(tmp_path: Path):
    """With a gradient of nothing but the first layer's, a step that lets it rest has a norm of 0."""

    class First(ToyTask):
        def step(self, model, batch, step):
            output = super().step(model, batch, step)
            return output._replace(loss=self.model.layers[0].weight.square().sum() + 0 * output.loss)

    toy_fit(tmp_path, toy_config(steps=4, log_every=1), First(toy_task().model, first_every=2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if line["split"] == "train"]
    assert [norm > 0 for norm in norms] == [True, False, True, False]


def test_micro_batches_equal_one_batch(tmp_path: Path):
    for accumulate in (1, 4):
        toy_fit(tmp_path / str(accumulate), toy_config(accumulate=accumulate), toy_task(first_every=3))
    assert_close_runs(tmp_path / "4", tmp_path / "1", tolerance=1e-5)


def test_killed_and_continued_is_uninterrupted(tmp_path: Path):
    toy_fit(tmp_path / "whole", toy_config(), toy_task(first_every=3))
    assert not toy_fit(tmp_path / "cut", toy_config(), toy_task(first_every=3, raise_stop_at=7)).finished
    toy_fit(tmp_path / "cut", toy_config(), toy_task(first_every=3))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(processes: Processes, tmp_path: Path):
    toy_fit(tmp_path / "one", toy_config(), toy_task(first_every=3))
    processes.together(toy_program, tmp_path / "two", {}, 3)
    assert_close_runs(tmp_path / "two", tmp_path / "one", tolerance=1e-5)
