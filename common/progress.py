"""Progress bars of one style: for a person at a terminal, and for nobody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
BAR_AFTER = 1.0  # seconds: of what may be done at once, a bar is shown only after them


def progress_bar(
    total: int, unit: str, *, shown: bool = True, done: int = 0, what: str | None = None, delay: float = 0
) -> tqdm:
    """A bar on stderr that counts to `total`; silent where stderr is a file or a pipe, where TQDM_DISABLE is set, and
    unless `shown`: of several processes the first has one. done: what an earlier run has; what: words before the bar;
    delay: seconds."""
    # tqdm heeds its variable only where it is told nothing, and takes "0" for yes.
    wanted = shown and os.environ.get("TQDM_DISABLE", "0").lower() in ("", "0", "false")
    silent = None if wanted else True  # None: tqdm asks whether stderr is a terminal
    return tqdm(total=total, initial=done, unit=f" {unit}", desc=what, delay=delay, disable=silent, dynamic_ncols=True)


def with_progress(
    items: Sequence[Item], unit: str, *, shown: bool = True, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """The items one by one, each counted in a `progress_bar` when the next is asked for; size: of an item, in units."""
    with progress_bar(sum(map(size, items)), unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.update(size(item))
