"""A second network with an optimiser of its own, and a guard that judges validations, in the loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError
from tests.training.runs import assert_same_run, metrics, newest_weights, weights
from tests.training.toy import ToyModel, ToyTask, toy_config, toy_fit, toy_task
from training.optimizers import OptimizerSettings
from training.setup import make_accelerator
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

    def __init__(
        self, bad: set[int] = frozenset(), patience: int = 2, stop_at: int | None = None, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        super().__init__(ToyModel(dropout=0.3), raise_stop_at=stop_at)
        self.critic = Critic()
        self.companions = {
            "critic": Companion(self.critic, OptimizerSettings(**settings), lambda step: 0.05 * (1 + step)),
            "frozen": Companion(nn.Linear(1, 1)),
        }
        if bad:
            self.guard = ScriptedGuard(self.critic, bad, patience)

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        loss, metrics, *_ = super().step(model, batch, step)
        guess = self.critic.layer(batch["x"][:, :1]).mean()
        own = (guess - loss.detach()).square()
        factor = 1 + self.critic.factor * guess.detach().sigmoid()
        return StepOutput(loss * factor, metrics, {"critic": own})

    def after_step(self, step: int) -> None:
        self.critic.steps += 1
        super().after_step(step)


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
        def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
            return super().step(model, batch, step)._replace(companion_losses={})

    toy_fit(tmp_path, toy_config(steps=6, schedule="constant"), Idle())
    assert checkpoint(tmp_path, 6, "critic_optimizer") == {}
    task = CriticTask()
    toy_fit(tmp_path, toy_config(steps=9, schedule="constant"), task)
    assert int(checkpoint(tmp_path, 9, "critic_optimizer")["step/layer.weight"]) == 3


def test_the_loop_moves_a_companion_at_the_learning_rate_of_its_schedule(tmp_path: Path):
    task = CriticTask()
    begin = task.critic.layer.weight.detach().clone()
    toy_fit(tmp_path / "one", toy_config(steps=1, log_every=1), task)
    moved = (task.critic.layer.weight - begin).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05))  # Adam's first step is the learning rate
    toy_fit(tmp_path / "more", toy_config(steps=4, log_every=1), CriticTask())
    found = [line["critic_learning_rate"] for line in metrics(tmp_path / "more", "train")]
    assert found == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_the_loop_clips_a_companion_and_says_its_norm(tmp_path: Path):
    norms = {}
    for clip in (0.0, 1e-3):
        run = tmp_path / str(clip)
        toy_fit(run, toy_config(steps=1, log_every=1), CriticTask(max_grad_norm=clip))
        state = checkpoint(run, 1, "critic_optimizer")
        squares = sum(float(value.sum()) for name, value in state.items() if name.startswith("exp_avg_sq/"))
        norms[clip] = (metrics(run, "train")[0]["critic_grad_norm"], math.sqrt(squares / (1 - 0.999)))
    assert norms[0.0][1] == pytest.approx(norms[0.0][0], rel=1e-3)
    assert norms[1e-3] == pytest.approx((norms[0.0][0], 1e-3), rel=1e-2)


def test_a_gradient_of_a_companion_that_is_not_finite_passes_it_over_alone(tmp_path: Path):
    class Poisoned(CriticTask):
        def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
            output = super().step(model, batch, step)
            factor = torch.nan if step == 2 else 1.0
            return output._replace(companion_losses={"critic": output.companion_losses["critic"] * factor})

    task = Poisoned()
    toy_fit(tmp_path, toy_config(steps=5, log_every=1), task)
    train = metrics(tmp_path, "train")
    assert [line["critic_skipped_steps"] for line in train] == [0, 0, 1, 1, 1]
    assert [line["skipped_steps"] for line in train] == [0] * 5
    assert ["critic_grad_norm" in line for line in train] == [True, True, False, True, True]
    assert int(checkpoint(tmp_path, 5, "critic_optimizer")["step/layer.weight"]) == 4
    assert all(value.isfinite().all() for value in task.critic.state_dict().values())


def test_a_step_that_the_model_skips_is_none_for_its_companions_either(tmp_path: Path):
    task = CriticTask()
    task.nan_draws = torch.tensor([17])  # in the third step
    toy_fit(tmp_path, toy_config(steps=5, log_every=1), task)
    assert int(checkpoint(tmp_path, 5, "critic_optimizer")["step/layer.weight"]) == 4
    assert metrics(tmp_path, "train")[-1]["critic_skipped_steps"] == 0


def test_the_loss_scale_goes_by_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scales: list[float] = []  # after each step

    class Scaler(torch.amp.GradScaler):  # on the CPU, in place of that of float16 on a GPU
        def update(self, new_scale: float | Tensor | None = None) -> None:
            super().update(new_scale)
            scales.append(self.get_scale())

    def with_scaler(*arguments: Any) -> Accelerator:
        accelerator = make_accelerator(*arguments)
        accelerator.scaler = Scaler("cpu", init_scale=64.0, growth_interval=3)
        return accelerator

    class Poisoned(CriticTask):
        def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
            output = super().step(model, batch, step)
            of_critic, of_model = (torch.nan if step in bad else 1.0 for bad in ((3, 6), (1, 6)))
            losses = {"critic": output.companion_losses["critic"] * of_critic}
            return output._replace(loss=output.loss * of_model, companion_losses=losses)

    monkeypatch.setattr("training.trainer.make_accelerator", with_scaler)
    toy_fit(tmp_path, toy_config(steps=8, log_every=1), Poisoned())
    # Halved where the model's gradient is not finite, doubled after three steps where it was; not touched, and the
    # step not counted, where it is the critic's alone.
    assert scales == [64, 32, 32, 32, 32, 64, 32, 32]
    assert [line["critic_skipped_steps"] for line in metrics(tmp_path, "train")] == [0, 0, 0, 1, 1, 1, 1, 1]
    # Gradients have the scale taken out before they are clipped and used.
    assert max(line["critic_grad_norm"] for line in metrics(tmp_path, "train") if "critic_grad_norm" in line) < 10


def test_micro_batches_of_a_companion_add_up_to_their_mean(tmp_path: Path):
    class Linear(CriticTask):  # a loss whose mean over micro-batches is that of the whole batch
        def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
            output = super().step(model, batch, step)
            return output._replace(companion_losses={"critic": self.critic.layer(batch["x"][:, :1]).square().mean()})

    for accumulate in (1, 4):
        config = toy_config(steps=6, accumulate=accumulate, log_every=1)
        toy_fit(tmp_path / str(accumulate), config, Linear(max_grad_norm=0.5))
    one, four = (checkpoint(tmp_path / str(accumulate), 6, "critic") for accumulate in (1, 4))
    torch.testing.assert_close(four["layer.weight"], one["layer.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_companion_in_float16_has_the_loss_scale_taken_out(tmp_path: Path):
    for precision in ("no", "fp16"):
        toy_fit(tmp_path / precision, toy_config(steps=12, log_every=1, precision=precision), CriticTask())
    full, half = (metrics(tmp_path / precision, "train") for precision in ("no", "fp16"))
    assert half[-1]["skipped_steps"] <= 2  # the first loss scales may be too high
    learnt = [line for line in half if "critic_grad_norm" in line]
    assert learnt[-1]["critic_grad_norm"] < 100 * full[-1]["critic_grad_norm"]  # the scale is 65536


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
