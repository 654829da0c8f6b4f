"""What a training holds in memory: what stays between steps, and what a forward pass keeps for the backward one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.task import Task
from training.trainer import Trainer


class Kept:
    """Counts what the forward pass of a micro-batch keeps for the backward pass, on any device."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.bytes = 0
        self._weights = {storage_of(weight) for weight in weights}

    @contextmanager
    def counted(self, task: Task) -> Iterator[None]:
        """Inside, the largest of the steps of a task is found."""
        plain = task.step

        def step(*args: Any, **kwargs: Any) -> Any:
            sizes: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                place = storage_of(tensor)
                if place not in self._weights:
                    sizes[place] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                output = plain(*args, **kwargs)
            self.bytes = max(self.bytes, sum(sizes.values()))
            return output

        owner: Any = task
        owner.step = step
        try:
            yield
        finally:
            del owner.step


def storage_of(tensor: Tensor) -> int:
    return own(tensor).untyped_storage().data_ptr()


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def memory_of(trainer: Trainer) -> dict[str, int]:
    """Bytes that a step does not change, by what they are for."""

    def size(tensors: Sequence[Tensor] | Iterator[Tensor]) -> int:
        return sum(own(tensor).nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())

    def in_optimizer(optimizer: torch.optim.Optimizer) -> int:
        values = [value for state in optimizer.state.values() for value in state.values()]
        return size([value for value in values if isinstance(value, Tensor)])

    def of_module(module: nn.Module) -> list[Tensor]:
        return [*module.parameters(), *module.buffers()]

    found = {
        "weights": size(of_module(trainer.task.model)),
        "gradients": size(trainer.learner.weights),
        "optimiser": in_optimizer(trainer.learner.optimizer),
    }
    if trainer.ema:
        found["averaged weights"] = size(of_module(trainer.ema.model))
    for name, companion in trainer.task.companions.items():
        found[name] = size(of_module(companion.module))
    for name, learner in trainer.companions.items():
        found[name] += size(learner.weights) + in_optimizer(learner.optimizer)
    return found
