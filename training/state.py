"""What a checkpoint of a run holds, and how the run takes it up again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from common.errors import UserError
from training.checkpoint import Checkpoints
from training.ema import EMA
from training.optimizers import Learner
from training.progress import Progress
from training.task import Task


class Training(Protocol):
    """What a trainer has that a checkpoint keeps, and what it takes to read one."""

    accelerator: Accelerator
    checkpoints: Checkpoints
    progress: Progress
    task: Task
    learner: Learner
    ema: EMA | None
    companions: dict[str, Learner]  # those that learn
    kept: dict[str, nn.Module]  # those that do not, and whose buffers are kept


def tensors_of(trainer: Training) -> dict[str, Mapping[str, Tensor]]:
    """Of everything that learns, in parts; each file of a whole checkpoint is one."""
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": trainer.task.model.state_dict(),
        "optimizer": trainer.learner.state(),
    }
    if trainer.ema:
        tensors["ema"] = trainer.ema.model.state_dict()
    for name, companion in trainer.companions.items():
        tensors[name] = companion.module.state_dict()
        tensors[f"{name}_optimizer"] = companion.state()
    return tensors | {name: module.state_dict() for name, module in trainer.kept.items()}


def state_of(trainer: Training) -> dict[str, Any]:
    """The rest, as JSON has it."""
    guard, scaler = trainer.task.guard, trainer.accelerator.scaler
    return {
        "progress": asdict(trainer.progress),
        "guard": guard.state() if guard is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def restore(trainer: Training, step: int) -> None:
    """Takes up the run where the checkpoint of `step` left it. Raises UserError for one that does not fit."""
    load(trainer, step)
    with explain_misfit(trainer, step):
        state = trainer.checkpoints.state(step)
        trainer.progress = Progress(**state["progress"])
        if trainer.task.guard is not None and state.get("guard") is not None:
            trainer.task.guard.load_state(state["guard"])
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])


def load(trainer: Training, step: int) -> None:
    """Everything that learns, from the checkpoint of `step`. Raises UserError for one that does not fit."""
    checkpoints = trainer.checkpoints
    with explain_misfit(trainer, step):
        ours = trainer.task.model.state_dict()
        trainer.task.model.load_state_dict(checkpoints.tensors(step, "model", ours))
        trainer.learner.load_state(checkpoints.tensors(step, "optimizer", ours))
        if trainer.ema:
            trainer.ema.model.load_state_dict(checkpoints.tensors(step, "ema", ours))
        for name, companion in trainer.companions.items():
            companion.module.load_state_dict(checkpoints.tensors(step, name))
            companion.load_state(checkpoints.tensors(step, f"{name}_optimizer"))
        for name, module in trainer.kept.items():
            module.load_state_dict(checkpoints.tensors(step, name))


@contextmanager
def explain_misfit(trainer: Training, step: int) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, RuntimeError, FileNotFoundError) as error:
        raise UserError(
            f"{trainer.checkpoints.path(step)} does not fit this version's model: {' '.join(str(error).split())}; "
            "continue with the version that wrote it, or start another run"
        ) from error
