from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from tests.training.runs import metrics, newest_weights
from tests.training.toy import toy_config, toy_fit, toy_task


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
