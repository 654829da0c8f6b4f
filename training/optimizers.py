"""Weights, their optimiser and its schedule: what a step does alike to the model and to each companion that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.distributed import is_share, mean_over_processes, own_part, several_processes, sum_over_processes

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
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        average_gradients(self.weights)

    def average_whole(self) -> None:
        """Averages gradients over processes for what each of them has whole beside shares, whose gradients are averaged
        when they are made. A weight without a gradient has none on any process."""
        average_gradients([weight for weight in self.weights if not is_share(weight) and weight.grad is not None])

    def clip(self, scaler: torch.amp.GradScaler | None) -> Tensor:
        """Takes the loss scale out of the gradients, and bounds their norm. Returns the norm before that."""
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if any(is_share(weight) for weight in self.weights):
            return clip_shares(self.weights, self.settings.max_grad_norm or math.inf)
        if not self.settings.max_grad_norm:  # PyTorch's would multiply all gradients by 1
            return nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        return nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm)

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


def average_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Averages the gradients that these weights have, in one message of all processes."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return
    flat = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)


@torch.no_grad()
def clip_shares(weights: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """As `nn.utils.clip_grad_norm_`, for weights of which some are shares: the norm is of all processes' gradients, the
    same bits everywhere, so that all skip a step or none."""
    shares = [own_part(weight.grad) for weight in weights if weight.grad is not None and is_share(weight)]
    whole = [weight.grad for weight in weights if weight.grad is not None and not is_share(weight)]
    squares = sum_over_processes(nn.utils.get_total_norm(shares).square()) if shares else torch.zeros(())
    if whole:
        squares = squares + nn.utils.get_total_norm(whole).square()
    norm = squares.sqrt()
    if max_norm < math.inf:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the sum and the bound of clip_grad_norm_
        for gradient in (*shares, *whole):
            gradient.mul_(factor)
    return norm


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

    groups = [  # one launch each, of shares alone or of whole weights alone
        {"params": [weight for weight in part if is_matrix(weight) == decays], "weight_decay": decay}
        for part in ([w for w in weights if not is_share(w)], [w for w in weights if is_share(w)])
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=settings.betas,
        fused=True,
    )


def names_of_weights(model: nn.Module) -> dict[Tensor, str]:
    """By which the state dict has each weight, of tied ones the first: saved models and optimisers use the same, and
    they last longer than where a weight lies in the code."""
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(tensor, name)
    return names


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `entry/weight`, such as `exp_avg/decoder.weight`."""
    names = names_of_weights(model)
    return {
        f"{entry}/{names[parameter]}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for an optimiser of the same weights."""
    names = names_of_weights(model)
    description = optimizer.state_dict()  # numbers the weights group by group, which is how state must be given back
    numbers = {
        names[parameter]: number
        for number, parameter in enumerate(weight for group in optimizer.param_groups for weight in group["params"])
    }
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        entry, name = key.split("/", 1)
        state.setdefault(numbers[name], {})[entry] = value.clone()  # what was loaded lies in the file's memory map
    optimizer.load_state_dict({"state": state, "param_groups": description["param_groups"]})
