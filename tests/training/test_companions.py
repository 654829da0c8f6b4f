"""A second network with an optimiser of its own, and a guard that judges validations, in the loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError
from tests.training.test_loop import assert_same_run, metrics, newest_weights, weights
from tests.training.toy import ToyModel, ToyTask, toy_config, toy_fit, toy_task
from training.task import Batch, Companion, StepOutput, Verdict


class Critic(nn.Module):
    """Learns to predict the toy's error, and counts its steps."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("factor", torch.ones(()))


class ScriptedGuard:
    """Objects to the validations of given numbers, counted from 0, and wants a rollback after `patience` of them."""

    def __init__(self, critic: Critic, bad: set[int], patience: int) -> None:
        self.critic, self.bad, self.patience = critic, bad, patience
        self.seen: list[int] = []  # bad validations in a row before each
        self.rollbacks: list[tuple[int, int]] = []
        self.factor = 1.0

    def judge(self, metrics: dict[str, float], bad_before: int, step: int) -> Verdict:
        number = math.ceil(step / 4) - 1
        self.seen.append(bad_before)
        if number not in self.bad:
            return Verdict(keep=True)
        return Verdict(keep=False, warning=f"validation {number} is bad", roll_back=bad_before + 1 >= self.patience)

    def rolled_back(self, step: int, rollbacks: int) -> None:
        self.rollbacks.append((step, rollbacks))
        self.critic.factor.fill_(0.5**rollbacks)
        self.factor = 0.5**rollbacks

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state(self, state: dict[str, Any]) -> None:
        self.factor = state["factor"]


class CriticTask(ToyTask):
    """The toy's loss is scaled by the critic, which learns beside it."""

    def __init__(self, bad: set[int] = frozenset(), patience: int = 2, stop_at: int | None = None) -> None:
        torch.manual_seed(0)
        super().__init__(ToyModel(dropout=0.3), raise_stop_at=stop_at)
        self.critic = Critic()
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=0.05, fused=True)
        self.companions = {
            "critic": Companion(self.critic, self.optimizer),
            "frozen": Companion(nn.Linear(1, 1)),
        }
        if bad:
            self.guard = ScriptedGuard(self.critic, bad, patience)

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        loss, metrics = super().step(model, batch, step)
        guess = self.critic.layer(torch.ones(1, 1)).squeeze()
        (guess - loss.detach()).square().backward()
        return StepOutput(loss * (1 + self.critic.factor * guess.detach().sigmoid()), metrics)

    def after_step(self, step: int) -> dict[str, Tensor]:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.critic.steps += 1
        return super().after_step(step)


def checkpoint(run: Path, step: int, name: str) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


def test_companions_are_checkpointed_with_their_optimisers_and_restored(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_fit(whole, toy_config(), CriticTask())
    assert not toy_fit(cut, toy_config(), CriticTask(stop_at=7)).finished
    task = CriticTask()
    toy_fit(cut, toy_config(), task)
    assert int(task.critic.steps) == 12
    assert "exp_avg/layer.weight" in checkpoint(cut, 12, "critic_optimizer")
    assert not (cut / "checkpoints" / "step_00000012" / "frozen.safetensors").exists()
    assert_same_run(cut, whole)


def test_a_companion_that_has_not_learnt_yet_has_an_empty_optimiser(tmp_path: Path):
    class Idle(CriticTask):
        def after_step(self, step: int) -> dict[str, Tensor]:
            self.optimizer.zero_grad()
            return ToyTask.after_step(self, step)

    toy_fit(tmp_path, toy_config(steps=6, schedule="constant"), Idle())
    assert checkpoint(tmp_path, 6, "critic_optimizer") == {}
    task = CriticTask()
    toy_fit(tmp_path, toy_config(steps=9, schedule="constant"), task)
    assert int(task.critic.steps) == 3


def test_a_checkpoint_without_companions_continues_a_task_without_them(tmp_path: Path):
    toy_fit(tmp_path, toy_config(steps=6, schedule="constant"))
    newest = max((tmp_path / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    del state["progress"]["rollbacks"]  # as it was before there were any
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "manifest.json").write_text(json.dumps({"files": {}}))
    assert toy_fit(tmp_path, toy_config(steps=9, schedule="constant")).steps_done == 9


def test_a_checkpoint_without_the_companion_of_a_task_is_one_sentence(tmp_path: Path):
    toy_fit(tmp_path, toy_config(steps=6), toy_task(dropout=0.3))
    with pytest.raises(UserError, match=r"step_00000006 does not fit this version's model: .*critic.safetensors"):
        toy_fit(tmp_path, toy_config(steps=9), CriticTask())


# ---- a guard --------------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {"steps": 32, "log_every": 4}  # a validation every four steps: numbers 0 to 7


def test_the_model_folder_holds_the_last_weights_that_the_guard_kept(tmp_path: Path, capsys):
    task = CriticTask(bad={5, 7}, patience=99)
    result = toy_fit(tmp_path, toy_config(**CONFIG), task)
    assert result.best_step == 28  # of validation 6
    assert result.metrics == {"loss": result.best_value}
    assert all(torch.equal(value, checkpoint(tmp_path, 28, "ema")[name]) for name, value in weights(tmp_path).items())
    assert task.guard.seen == [0, 0, 0, 0, 0, 0, 1, 0]
    said = capsys.readouterr().out
    assert "warning: validation 5 is bad" in said
    assert "best so far" not in said


def test_a_rollback_returns_everything_that_learns_and_goes_on(tmp_path: Path, capsys):
    task = CriticTask(bad={3, 4}, patience=2)
    result = toy_fit(tmp_path, toy_config(**{**CONFIG, "steps": 22, "save_every": 100}), task)
    assert task.guard.rollbacks == [(20, 1)]  # validation 2 at step 12, 3 at 16, 4 at 20
    assert "rollback 1: weights and optimisers are those of step 12 again" in capsys.readouterr().out
    for name in ("model", "ema", "optimizer", "critic_optimizer"):
        before, after = checkpoint(tmp_path, 12, name), checkpoint(tmp_path, 20, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    before, after = checkpoint(tmp_path, 12, "critic"), checkpoint(tmp_path, 20, "critic")
    assert torch.equal(before["layer.weight"], after["layer.weight"])
    assert (float(before["factor"]), float(after["factor"])) == (1, 0.5)
    assert result.steps_done == result.best_step == 22
    assert task.steps == list(range(22))  # no step is taken twice: numbers and samples go on


def test_a_run_killed_after_a_rollback_continues_as_if_it_had_not_been(tmp_path: Path):
    whole = tmp_path / "whole"
    bad = {3, 4, 6}
    task = CriticTask(bad=bad)
    toy_fit(whole, toy_config(**CONFIG), task)
    assert task.guard.rollbacks == [(20, 1)]
    assert task.guard.seen == [0, 0, 0, 0, 1, 0, 0, 1]  # bad ones in a row: none after the rollback
    for stop_at in (13, 18, 20, 23, 30):  # before, during and after what leads to the rollback
        cut = tmp_path / str(stop_at)
        assert not toy_fit(cut, toy_config(**CONFIG), CriticTask(bad=bad, stop_at=stop_at)).finished
        toy_fit(cut, toy_config(**CONFIG), finished := CriticTask(bad=bad))
        assert_same_run(cut, whole)
        assert finished.guard.factor == 0.5  # from the checkpoint, where the rollback was before the kill
    assert any(line["loss"] for line in metrics(whole, "validation"))
    assert all(value.isfinite().all() for value in newest_weights(whole).values())


def test_a_rollback_without_its_checkpoint_is_said_and_the_run_goes_on(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("training.checkpoint.Checkpoints.damage", lambda self, step: "it was eaten")
    result = toy_fit(tmp_path, toy_config(**CONFIG), CriticTask(bad={3, 4}))
    assert "no rollback: there is no good checkpoint to return to (it was eaten)" in capsys.readouterr().out
    assert result.steps_done == 32
