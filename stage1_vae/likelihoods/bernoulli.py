"""Bernoulli likelihood of binary images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vae.likelihoods.base import Likelihood, at_least_float


@dataclass(frozen=True, kw_only=True)
class BernoulliConfig:
    """Each number of an image is black or white, with a probability of its own. How grey images become so is said by
    data.binarised."""

    kind: Literal["bernoulli"] = "bernoulli"


PART = 2**17  # numbers that are computed at a time: a processor's cache holds them


def log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """x log p + (1 - x) log(1 - p) with p = sigmoid(l), which is x l - softplus(l), summed over c H W: logits l and
    targets x of one shape, `... c H W` -> `...`, at least float32."""
    logits = at_least_float(logits)
    return (targets * logits).sub_(F.softplus(logits, threshold=50)).sum(dim=(-3, -2, -1))


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, a part of their first axis at a time."""
    size = max(1, PART * len(tensors[0]) // max(tensors[0].numel(), 1))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class LogProbability(torch.autograd.Function):
    """`log_probability` in few passes over memory. With many draws logits are the largest tensor of a step: here it is
    the only one of its size that is kept, and its gradient, x - p times that of the result, the only one that is made,
    both of the type that the network computes in.
    """

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim == 3:
            return log_probability(logits, targets)
        return torch.cat([log_probability(*part) for part in in_parts(logits, targets)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, targets = ctx.saved_tensors
        gradient = gradient[..., None, None, None]
        of_targets = gradient * logits if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_targets
        if torch.is_grad_enabled():  # a gradient of this one may be asked for
            return gradient * (targets - at_least_float(logits).sigmoid()), of_targets
        of_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for one, logit, target, outer in in_parts(of_logits, logits, targets, gradient.expand_as(logits)):
            torch.mul(target - at_least_float(logit).sigmoid(), outer, out=one)
        return of_logits, of_targets


class Bernoulli(Likelihood):
    """The network puts out logits. Of grey values between black and white, x in [0, 1], `log_prob` is
    x log p + (1 - x) log(1 - p), which is no likelihood, but what many train on."""

    discrete = True

    def __init__(self, config: BernoulliConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.outputs = channels

    def log_prob(self, outputs: Tensor, images: Tensor, seen: Tensor | None = None) -> Tensor:
        logits, targets = torch.broadcast_tensors(outputs, (images + 1) / 2)
        if seen is not None:
            logits = at_least_float(logits)
            return ((targets * logits - F.softplus(logits, threshold=50)) * seen).sum(dim=(-3, -2, -1))
        if torch.compiler.is_compiling():  # which makes one pass of it by itself
            return log_probability(logits, targets)
        result: Tensor = LogProbability.apply(logits, targets)
        return result

    def mean(self, outputs: Tensor) -> Tensor:
        return at_least_float(outputs).sigmoid() * 2 - 1

    def mode(self, outputs: Tensor) -> Tensor:
        return torch.where(outputs > 0, 1.0, -1.0)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(at_least_float(outputs).sigmoid(), generator=generator) * 2 - 1
