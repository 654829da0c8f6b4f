"""A task small enough to train in a second, and a program that trains it: what the tests of the loop run."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import STOPPED_CODE
from common.model_io import PretrainedModel
from common.processes import leave
from training.loop import FitResult, TrainConfig, fit
from training.task import Batch, Companion, Guard, StepOutput


class ToyModel(PretrainedModel):
    """Two layers, and a running mean of the inputs which, like an EMA codebook, moves once per step."""

    kind = "toy"

    def __init__(self, width: int = 16, dropout: float = 0.0):
        super().__init__()
        self.width, self.dropout = width, dropout
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )
        self.input_mean: Tensor
        self.pending: Tensor
        self.register_buffer("input_mean", torch.zeros(4))
        self.register_buffer("pending", torch.zeros(4), persistent=False)

    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, "dropout": self.dropout}

    @classmethod
    def from_arguments(cls, **arguments: Any) -> ToyModel:
        return cls(**arguments)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.pending += x.detach().float().mean(0)
        return self.layers(x - self.input_mean).squeeze(-1)


class ToyData:
    """y = sum of sin(x), with noise that belongs to the draw, as random augmentation does."""

    def __init__(self, size: int, noise: float = 0.0):
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, 4, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        x = self.x[list(indices)]
        noise = torch.tensor([float((draw * 7919) % 101) / 101 - 0.5 for draw in draws])
        return {"x": x, "y": x.sin().sum(-1) + self.noise * noise, "draws": torch.tensor(list(draws))}


class ToyTask:
    """Regression. `nan_draws` poisons the loss of the micro-batches that hold one of these draws. The first layer
    learns in every `first_every`-th step only."""

    best_metric = "loss"

    def __init__(
        self,
        model: ToyModel,
        nan_draws: Sequence[int] = (),
        raise_stop_at: int | None = None,
        first_every: int = 1,
    ):
        self.model = model
        self.companions: dict[str, Companion] = {}
        self.guard: Guard | None = None
        self.first_every = first_every
        self.nan_draws, self.raise_stop_at = torch.tensor(list(nan_draws)), raise_stop_at
        self.seen: list[list[int]] = []
        self.steps: list[int] = []  # of each micro-batch
        self.ended: list[int] = []  # of each step that was not skipped
        self.asked: list[int] = []  # the last of these, whenever its health was asked for
        self.started: list[Batch] = []
        self.micro_batches = 0
        self.discarded = 0

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.started = list(batches)

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        self.micro_batches += 1
        self.steps.append(step)
        self.seen.append(batch["draws"].tolist())
        loss = F.mse_loss(model(batch["x"]).float(), batch["y"])
        if torch.isin(batch["draws"].cpu(), self.nan_draws).any():
            loss = loss * float("nan")
        resting = tuple(self.model.layers[0].parameters()) if step % self.first_every else ()
        return StepOutput(loss, {"error": loss.detach().sqrt()}, resting=resting)

    def after_step(self, step: int) -> None:
        self.ended.append(step)
        mean = self.model.pending / max(self.micro_batches, 1)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        self.model.input_mean.lerp_(mean, 0.1)
        self._forget()
        if self.raise_stop_at is not None and len(self.seen) >= self.raise_stop_at:
            self.raise_stop_at = None
            os.kill(os.getpid(), signal.SIGTERM)

    def health(self) -> dict[str, Tensor]:
        self.asked.append(self.ended[-1])
        return {"input_mean_norm": self.model.input_mean.norm()}

    def discard_step(self) -> None:
        self.discarded += 1
        self._forget()

    def _forget(self) -> None:
        self.model.pending.zero_()
        self.micro_batches = 0

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (model(batch["x"]).float() - batch["y"]) ** 2}

    def preview(self, model: nn.Module) -> Tensor | None:
        return torch.linspace(-1, 1, 12).reshape(1, 3, 4)

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return ["the toy is unhappy: nothing to do"] if metrics.get("loss", 0) > 1e6 else []


def toy_config(**changes: Any) -> TrainConfig:
    defaults = {
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "log_every": 2,
        "validate_every": 4,
        "preview_every": 0,
        "save_every": 3,
        "tracker": "none",
        "workers": 0,
        "ema_decay": 0.9,
    }
    return TrainConfig(**{**defaults, **changes})


def toy_task(dropout: float = 0.0, **options: Any) -> ToyTask:
    torch.manual_seed(0)
    return ToyTask(ToyModel(dropout=dropout), **options)


def toy_fit(run: Path, config: TrainConfig, task: ToyTask | None = None, train: ToyData | None = None) -> FitResult:
    """Fits the toy on 37 samples, which batches of 8 do not divide, and validates it on 13 others."""
    task = task or toy_task()
    resolved = {"model": task.model.arguments(), "train": asdict(config)}
    return fit(task, train or ToyData(37, 0.1), ToyData(13), config, run, resolved)


def toy_program(run: Path, config: dict[str, Any], first_every: int = 1) -> FitResult:
    """What a process of its own does."""
    result = toy_fit(run, toy_config(**config), toy_task(first_every=first_every))
    print(f"stopped by {result.stopped_by} after {result.steps_done}")
    return result


def toy_command(run: Path, config: dict[str, Any]) -> None:
    """As a command of ours: the exit code tells whether the training is finished."""
    leave(0 if toy_program(run, config).finished else STOPPED_CODE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=json.loads, default={})
    arguments = parser.parse_args()
    toy_command(arguments.run, arguments.config)


if __name__ == "__main__":
    main()
