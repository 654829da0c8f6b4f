"""Weights, their optimiser and its schedule: what a step does alike to the model and to each companion that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.distributed import mean_over_processes, several_processes
from training.checkpoint import load_optimizer_tensors, optimizer_tensors

RMSPROP_DECAY = 0.99
ADAMAX_EPSILON = 1e-3  # added to gradients in the running maximum, as NVAE has it

Schedule = Callable[[int], float]
"""The learning rate of a step of the run, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Of the optimiser, and of what comes before it."""

    kind: Literal["adam", "adamax", "rmsprop"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0  # of weights of two and more axes; 0 is plain Adam
    max_grad_norm: float = 0.0  # gradients are scaled down to this norm; 0 is off


class Learner:
    """The weights of `module` that learn. Their gradients add up over a step's micro-batches; then come, in this order,
    `average`, `clip` and `move`, or not, and `forget`."""

    def __init__(self, module: nn.Module, settings: OptimizerSettings, schedule: Schedule) -> None:
        self.module, self.settings, self.schedule = module, settings, schedule
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.optimizer = make_optimizer(self.weights, settings, schedule(0))

    def has_gradients(self) -> bool:
        return any(weight.grad is not None for weight in self.weights)

    def average(self) -> None:
        """Averages gradients over processes, for a module that is not wrapped in DistributedDataParallel. A weight
        without a gradient here has one of 0, as others may have another."""
        if not several_processes():
            return
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]
        flat = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([weight.numel() for weight in self.weights])
        for weight, part in zip(self.weights, parts, strict=True):
            weight.grad = part.view_as(weight)

    def clip(self, scaler: torch.amp.GradScaler | None) -> Tensor:
        """Takes the loss scale out of the gradients, and bounds their norm. Returns the norm before that."""
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm or math.inf)

    def move(self, step: int) -> None:
        """Moves the weights by their gradients, at the learning rate of this step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step)
        self.optimizer.step()

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.module)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        load_optimizer_tensors(self.optimizer, self.module, tensors)


def make_optimizer(
    weights: list[nn.Parameter], settings: OptimizerSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), which is Adam where weight_decay is 0. What has one
    number for each channel does not decay: biases, norms and gains of weight normalisation. Or RMSprop in its centred
    form (Graves 2013, arXiv:1308.0850, equations 38 to 41), or Adamax (Kingma and Ba 2014, arXiv:1412.6980, section
    7.1), both without decay of weights."""
    if settings.kind == "adamax":
        return torch.optim.Adamax(weights, lr=learning_rate, betas=settings.betas, eps=ADAMAX_EPSILON)
    if settings.kind == "rmsprop":
        return torch.optim.RMSprop(weights, lr=learning_rate, alpha=RMSPROP_DECAY, centered=True)

    def is_matrix(weight: nn.Parameter) -> bool:
        return sum(side > 1 for side in weight.shape) >= 2

    groups = [
        {"params": [weight for weight in weights if is_matrix(weight)], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if not is_matrix(weight)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=settings.betas,
        fused=True,
    )
