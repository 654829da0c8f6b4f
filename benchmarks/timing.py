"""Time side by side: works that take turns in one process, and the median of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from common.memory import keep_freed_memory


def medians(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each work, taken in turns after one run that does not count, until a GPU has done all that it was
    given. What else the machine does meets all of them alike, and so does how freed memory is kept: as commands keep
    it."""
    keep_freed_memory()
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}
