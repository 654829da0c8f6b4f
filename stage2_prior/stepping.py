"""The one loop that walks the codes of an image in order. Sampling, inpainting and coding differ in `choose` only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Choose = Callable[[int, Tensor], Tensor]
"""(position, logits b k) -> the codes at that position, int64 b: drawn, known, or read from a compressed stream."""


class Stepper(Protocol):
    """A prior on its way through a batch of images, at the cost of one position per call."""

    def next(self, previous: Tensor | None) -> Tensor:
        """Logits `b k`, float32, of the next code; k is its grid's vocabulary. previous: int64 `b`, the codes just
        chosen; None at the first."""
        ...


@torch.inference_mode()
def walk(stepper: Stepper, positions: int, choose: Choose) -> Tensor:
    """Codes `b n`, chosen one after the other, each from logits that know all codes before it."""
    chosen: list[Tensor] = []
    for position in range(positions):
        logits = stepper.next(chosen[-1] if chosen else None)
        chosen.append(choose(position, logits))
    return torch.stack(chosen, dim=1)


class GuidedStepper:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) around a stepper of 2b samples, made with
    `Condition.doubled_for_guidance`: the first b follow their labels, the last b the null label."""

    def __init__(self, doubled: Stepper, guidance: float):
        self.doubled = doubled
        self.guidance = guidance  # 0 = no label, 1 = the label as trained, above 1 = exaggerated

    def next(self, previous: Tensor | None) -> Tensor:
        logits = self.doubled.next(None if previous is None else previous.repeat(2))
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def step_dtype(weight: Tensor) -> torch.dtype:
    """What a stepper computes in: autocast's type where autocast is on while it is made, else that of the weights."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
