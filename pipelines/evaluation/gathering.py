"""Numbers of each image from all processes, in the order of the images: what is made of them is the same bit for bit,
whoever computed which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState

from common.progress import progress_bar
from images.datasets import ImageDataset
from metrics.statistics import FeatureStatistics

Values = dict[str, np.ndarray]
"""By name, one row an image, in the order of the images."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def of_all_batches(
    batches: Sequence[Item], work: Callable[[Item], Values | None], state: PartialState, what: str
) -> Values:
    """`work` of every batch, joined in their order, on the first process; nothing on the others. None stands for a
    batch without images. All processes call it together, with the same batches."""
    parts = results_of_all(batches, work, state, what)
    return joined([part for part in parts if part is not None])


def results_of_all(
    batches: Sequence[Item], work: Callable[[Item], Result], state: PartialState, what: str
) -> list[Result]:
    """`work` of every batch, in their order, on the first process; an empty list on the others."""
    mine = range(state.process_index, len(batches), state.num_processes)
    with progress_bar(len(mine), what, shown=state.is_main_process) as progress:
        numbered = []
        for number, result in zip(mine, one_thread_each(work, [batches[i] for i in mine], state.device), strict=True):
            numbered.append((number, result))
            progress.update()
    gathered = on_first_process(numbered, state)
    return [result for _, result in sorted(gathered, key=lambda pair: pair[0])]


def on_first_process(items: list[Any], state: PartialState) -> list[Any]:
    """Those of all processes, on the first; none on the others."""
    if state.num_processes == 1:
        return items
    parts: list[Any] | None = [None] * state.num_processes if state.is_main_process else None
    torch.distributed.gather_object(items, parts, dst=0)
    return [item for part in parts or [] for item in part]


def know_all_bad_images(images: ImageDataset, state: PartialState) -> None:
    """Tells the first process which images others could not read. Raises UserError where they are too many."""
    for seen in on_first_process([dict(images.bad_images.seen)], state):
        for location, reason in seen.items():
            if location not in images.bad_images.seen:
                images.bad_images.add(location, reason)


def joined(parts: Sequence[Values]) -> Values:
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def one_thread_each(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """`work` of each item, in order. On a CPU each by one thread, and as many at a time as there are threads: matrix
    products add up in an order that depends on the number of threads, and figures must not."""
    if device.type != "cpu":
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)


def statistics_of(features: np.ndarray) -> FeatureStatistics:
    """Mean and covariance of features n d, by one thread."""
    with one_thread():
        return FeatureStatistics.of(torch.from_numpy(features))


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: the same sums on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
