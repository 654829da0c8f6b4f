"""Random numbers of a step's samples: noise of a quantizer, masks, labels that are left out.

In a training step those of a sample are a function of the run's seed, the number of the step and the sample's place in
the batch of that step. So a sample draws the same on however many processes and in however many micro-batches. Outside
of a step the global generator draws them.

Where a step has few numbers, each process draws those of all samples and takes its part. Where it has many, such as
Gumbel noise for thousands of codes, each draws for its own samples, one after the other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from common.compatibility import never_compiled
from common.recompute import once_agreed

FEW = 2**20  # numbers of all samples of a step


class MicroBatch(NamedTuple):
    """Places `first` and those after it, one a sample, in the batch of a step, of `total` samples."""

    seed: int  # of the step
    first: int
    size: int
    total: int


class _State:
    """Whose numbers are drawn now. A process computes one micro-batch at a time."""

    micro_batch: MicroBatch | None = None
    drawn: int = 0  # how often, since the micro-batch began: each time is another


_state = _State()


@contextmanager
def draws_of(micro_batch: MicroBatch) -> Iterator[None]:
    """Inside, what is drawn for as many samples as a micro-batch has is drawn for these."""
    before = _state.micro_batch, _state.drawn
    _state.micro_batch, _state.drawn = micro_batch, 0
    try:
        yield
    finally:
        _state.micro_batch, _state.drawn = before


@never_compiled
@torch.no_grad()
def uniform(*shape: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float32, of a shape that begins with the samples."""
    return filled(torch.empty(shape, device=device), lambda x, generator: x.uniform_(generator=generator))


@never_compiled
@torch.no_grad()
def uniform_of_step(*shape: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float32, that belong to no sample: in a step the same for all of them, in whichever
    micro-batch and process they are."""
    now = _state.micro_batch
    if now is None:
        return torch.rand(shape, device=device)
    return once_agreed(lambda: torch.rand(shape, device=device, generator=next_generator(now, device)))


@never_compiled
@torch.no_grad()
def normal_like(tensor: Tensor, axis: int = 0) -> Tensor:
    """Standard normal numbers, of the shape and type of `tensor`; axis: that of the samples."""
    empty = empty_rows(tensor).movedim(axis, 0)
    return filled(empty, lambda x, generator: x.normal_(generator=generator)).movedim(0, axis)


@never_compiled
@torch.no_grad()
def exponential_like(tensor: Tensor) -> Tensor:
    """Standard exponential numbers, of the shape and type of `tensor`, whose first axis is that of the samples; none is
    0. Of uniform ones: on a CPU `exponential_` takes four times as long."""
    drawn = filled(empty_rows(tensor), lambda x, generator: x.uniform_(generator=generator))
    smallest = torch.finfo(drawn.dtype).eps / 4  # half the distance of two uniform numbers, of which one is 0
    return drawn.clamp(min=smallest).neg_().log1p_().neg_()  # what was drawn is kept for a recomputation


@never_compiled
@torch.no_grad()
def spread(count: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float32 `count`, each uniform, those of all samples of a step evenly apart: they make a better
    estimate than independent ones (Kingma et al. 2021, arXiv:2107.00630)."""
    now = _state.micro_batch
    if now is None or now.size != count:
        return (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1
    places = torch.arange(now.first, now.first + count, device=device)
    offset = once_agreed(lambda: torch.rand((), device=device, generator=next_generator(now, device)))
    return (offset + places / now.total) % 1


@never_compiled
@torch.no_grad()
def stratified(count: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float32 `count`, each uniform: one in each of as many equal parts as a step has samples."""
    now = _state.micro_batch
    first, total = (0, count) if now is None or now.size != count else (now.first, now.total)
    places = torch.arange(first, first + count, device=device)
    return (places + uniform(count, device=device)) / total


def empty_rows(tensor: Tensor) -> Tensor:
    """Of its shape and type, row by row in memory: torch fills what is channels_last with other numbers."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def filled(empty: Tensor, fill: Callable[[Tensor, torch.Generator | None], Tensor]) -> Tensor:
    """A tensor like `empty`, whose first axis is that of the samples, with the numbers that `fill` puts into one."""
    now = _state.micro_batch
    if now is None or now.size != len(empty):
        return fill(empty, None)
    return once_agreed(lambda: filled_for(now, empty, fill))


def filled_for(now: MicroBatch, empty: Tensor, fill: Callable[[Tensor, torch.Generator | None], Tensor]) -> Tensor:
    generator = next_generator(now, empty.device)
    if now.total * math.prod(empty.shape[1:]) <= FEW:
        of_all = fill(empty.new_empty(now.total, *empty.shape[1:]), generator)
        return of_all[now.first : now.first + now.size]
    seed = generator.initial_seed()
    for place, one in enumerate(empty, now.first):
        fill(one, generator.manual_seed(mixed(seed, place)))
    return empty


def next_generator(now: MicroBatch, device: torch.device) -> torch.Generator:
    """The same for all micro-batches of a step, and another each time."""
    _state.drawn += 1
    return torch.Generator(device).manual_seed(mixed(now.seed, _state.drawn))


def mixed(*numbers: int) -> int:
    """A seed of several: neighbouring ones share nothing."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds
