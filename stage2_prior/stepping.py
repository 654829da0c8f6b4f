"""The one loop that walks the codes of an image in order. Sampling, inpainting and coding differ in `choose` only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Choose = Callable[[int, Tensor], Tensor]
"""(position, logits b m k) -> the codes at the m positions from there on, int64 b m: drawn, known, or read from a
compressed stream."""


class Stepper(Protocol):
    """A prior on its way through a batch of images, at the cost of what it predicts, not of the whole image.

    Most priors predict one code at a time, m = 1. One that predicts many at once, such as a scale of VAR, gives the
    logits of all of them together.
    """

    def next(self, previous: Tensor | None) -> Tensor:
        """Logits `b m k`, float32, of the next m codes; k is their grid's vocabulary. previous: int64 `b m'`, the codes
        just chosen; None at the first."""
        ...


class WindowStepper(Stepper, Protocol):
    """A stepper that predicts one code at a time, or those of several places of each sample in one pass: what can be
    guessed is checked at the cost of little more than one step."""

    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        """Logits `b w k`, float32, of the codes at places first, ..., first+w-1 of each sample. first: int64 `b`,
        places that differ from sample to sample; previous: int64 `b w`, the code before each of these places (not
        looked at where the place is 0: there the prior's start stands).

        Places before `first` must have been seen by earlier calls with the codes that now stand there. Keys and values
        of the window's places are written anew, so a place may be asked again with other codes before it, and later
        places are not looked at. Places beyond the last (first+w > n) are allowed and give logits that mean nothing.
        Where grids differ in their vocabulary, k is the largest, as in `AutoregressivePrior.logits`."""
        ...


class GroupStepper(WindowStepper, Protocol):
    """A stepper that goes by an order of each sample and can tell several codes from the same known ones: they are
    drawn together, at the cost of little more than one step, as if they did not depend on each other."""

    def group(self, sequence: Tensor, seen: Sequence[int], done: Sequence[int], width: int) -> Tensor:
        """Logits `b width k`, float32, of the codes from number `done` of each sample's order on, each given those
        before `done`. sequence: int64 `b n`, the codes in that order; seen: the `done` of the call before, -1 at the
        first. Logits beyond the last code mean nothing."""
        ...


@torch.inference_mode()
def walk(stepper: Stepper, positions: int, choose: Choose) -> Tensor:
    """Codes `b n`, chosen one step after the other, each from logits that know all codes of earlier steps."""
    chosen: list[Tensor] = []
    done = 0
    while done < positions:
        logits = stepper.next(chosen[-1] if chosen else None)
        chosen.append(choose(done, logits))
        done += logits.shape[1]
    return torch.cat(chosen, dim=1)


class GuidedStepper:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) around a stepper of 2b samples, made with
    `Prior.doubled_for_guidance`: the first b follow their labels, the last b the null label."""

    def __init__(self, doubled: Stepper, guidance: Sequence[float]):
        """guidance: of each step; 0 = no label, 1 = the label as trained, above 1 = exaggerated."""
        self.doubled = doubled
        self.guidance = guidance
        self.step = 0

    def next(self, previous: Tensor | None) -> Tensor:
        logits = self.doubled.next(None if previous is None else previous.repeat(2, 1))
        self.step += 1
        label, null = logits.chunk(2)
        return guided(label, null, self.guidance[self.step - 1])


class GuidedWindowStepper(GuidedStepper):
    """The same around a stepper that takes windows."""

    doubled: WindowStepper

    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        weights = torch.tensor(self.guidance, device=first.device)
        places = first[:, None] + torch.arange(previous.shape[1], device=first.device)
        label, null = self.doubled.window(first.repeat(2), previous.repeat(2, 1)).chunk(2)
        return guided(label, null, weights[places.clamp(max=len(weights) - 1), None])


def guided(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Logits `b ...` of the label, moved on from those of the null label. guidance: of all samples, or `b 1 1` of
    each."""
    return unconditional + guidance * (conditional - unconditional)


def step_dtype(weight: Tensor) -> torch.dtype:
    """What a stepper computes in: autocast's type where autocast is on while it is made, else that of the weights."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
