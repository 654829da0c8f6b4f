"""Images batch after batch: each is made when it is asked for, and nobody here holds it longer than it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from common.errors import UserError
from common.progress import BAR_AFTER, progress_bar

Batch = TypeVar("Batch")


def made_in_batches(num: int, batch_size: int, make: Callable[[slice], Batch], progress: bool) -> Iterator[Batch]:
    """`make` of images 0 to `num` - 1, `batch_size` at a time. progress: whether a terminal shows a bar where it takes
    long. Raises UserError, at once, where there is none to make."""
    if num < 1 or batch_size < 1:
        raise UserError(f"got num={num} and batch_size={batch_size}, expected at least 1 of each")

    def batches() -> Iterator[Batch]:
        with progress_bar(num, "images", shown=progress, delay=BAR_AFTER) as bar:
            for start in range(0, num, batch_size):
                made = make(slice(start, min(start + batch_size, num)))
                bar.update(min(batch_size, num - start))
                yield made
                del made  # before the next one is made

    return batches()


def gathered(batches: Iterable[Sequence[Tensor]], num: int) -> list[Tensor]:
    """The tensors of all batches, b ... each, as tensors of `num` images in the CPU's memory. That is allocated once:
    at no time is there more than the result and one batch, and on the pipeline's device one batch alone."""
    whole: list[Tensor] = []
    done = 0
    for batch in batches:
        whole = whole or [torch.empty(num, *part.shape[1:], dtype=part.dtype) for part in batch]
        count = len(batch[0])
        for tensor, part in zip(whole, batch, strict=True):
            tensor[done : done + count] = part
        done += count
        del batch, part  # before the next one is made
    return whole
