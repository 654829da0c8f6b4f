"""What is missing of a folder, who makes it, and what the last one does when nothing is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from common.errors import UserError
from common.folder_lock import held_part
from common.processes import on_main_process
from common.progress import progress_bar
from pipelines.generation.bucket import results_bucket
from pipelines.generation.encoder import Form
from pipelines.generation.finishing import lines_in
from pipelines.generation.layout import Layout, batches
from pipelines.generation.plan import Plan
from pipelines.generation.records import (
    LEFT_OUT,
    Record,
    missing_of,
    passes_of,
    record_name,
    recorded_ends,
    sizes_of,
    tar_size,
    with_records,
    write_passes,
    write_record,
)
from pipelines.generation.sinks import Sink, files_of_unit, tar_of_unit
from pipelines.generation.store import FolderStore, Store
from pipelines.generation.writers import Writers
from pipelines.settings import results_folder

NUMBERED = "[0-9]" * 6 + "*.*"  # pattern of results
BATCH_SIZE = 64  # when nothing else is said
READ_AGAIN = 10_000  # images: a folder of more is gone through by sizes
ALL = range(2**62)  # the part of a folder that a job without --range keeps

Use = Callable[[int, Image.Image | None], None]
Draw = Callable[[range, Sequence[int], Use], list[int] | None]
"""(a batch, those of its samples that are wanted, what is done with the picture of one): makes the batch as a whole, as
a sample's last bits may depend on those beside it, and hands over the wanted ones, in any thread: None for one that
cannot be made, which is left out. Returns how many passes through the prior each sample of the batch took, where that
is worth to be recorded."""


class Work(NamedTuple):
    """A folder of samples, and the part of it that a job makes."""

    store: Store
    layout: Layout
    plan: Plan
    asked: int | None  # images of a batch; None: BATCH_SIZE, or one batch of fewer images than that
    part: range | None = None  # of the samples; None: all of them, in a folder that no other job writes to
    form: Form = Form("png")
    stale: Callable[[range], Collection[int]] = lambda unit: ()  # samples of a unit to make anew, whatever is there

    @property
    def batch_size(self) -> int:
        return min(self.asked or min(BATCH_SIZE, self.plan.num), self.layout.per_shard)

    @property
    def closely(self) -> bool:
        """Whether a rerun reads each image that is there, not its size alone. A bucket keeps checksums of its own."""
        return isinstance(self.store, FolderStore) and self.plan.num <= READ_AGAIN

    def grown(self) -> Work:
        """With the samples that are there beyond those asked for, if they all are. Those with names are as many as
        there are names."""
        num, there = self.plan.num, lines_in(self.store)
        if there <= num or self.layout.stems is not None:
            return self
        first = num - num % self.layout.per_shard
        units = self.layout.units(range(first, there), there)
        for unit, record in with_records(self.store, units, recorded_ends(self.store)):
            if any(i >= num for i in missing_of(self.store, self.layout, unit, record, self.closely)):
                return self
        return self._replace(plan=self.plan._replace(num=there))

    def units(self) -> Iterator[range]:
        return self.layout.units(self.part or range(self.plan.num), self.plan.num)

    def missing(self, unit: range, record: Record | None) -> list[int]:
        """The samples of a unit that are to be made."""
        stale = set(self.stale(unit))
        if stale and self.layout.format == "tar":
            return list(unit)
        return sorted(stale.union(missing_of(self.store, self.layout, unit, record, self.closely)))


class Missing(NamedTuple):
    work: Work
    units: list[tuple[int, int]]  # the first sample, and how many images are missing; none: only its record is
    images: int


def find_missing(work: Work) -> Missing:
    """Looks at every image of the part: at its size where the unit is recorded, else, and of few images, at all of
    it."""
    work = work.grown()
    ends = recorded_ends(work.store)
    units: list[tuple[int, int]] = []
    for unit, record in with_records(work.store, work.units(), ends):
        missing = work.missing(unit, record)
        if missing or record is None or len(record.sizes) < len(unit):
            units.append((unit.start, len(missing)))
    return Missing(work, units, sum(count for _, count in units))


def make_units(work: Work, starts: Sequence[tuple[int, int]], draw: Draw, *, shown: bool) -> None:
    """Makes what is missing of these units, each with its record as soon as it is complete: while the last pictures of
    one are written, those of the next are made."""
    ends = recorded_ends(work.store)
    units = [work.layout.unit(start, work.plan.num) for start, _ in starts]
    with ExitStack() as stack, progress_bar(sum(count for _, count in starts), "images", shown=shown) as progress:
        writers = stack.enter_context(Writers(2 * work.batch_size))
        begun: deque[Begun] = deque()

        def finish(how_many: int, *, wait: bool) -> None:
            """Units but for the last ones that were begun."""
            while len(begun) > how_many and (wait or begun[0].sink.is_written()):
                begun.popleft().finish(work, ends)

        for unit, record in with_records(work.store, units, ends):
            missing = set(work.missing(unit, record))
            known = [] if record is None else record.sizes
            left_out = {i for i, size in zip(unit, known, strict=False) if size == LEFT_OUT} - missing
            begun.append(Begun(unit, {}, left_out, *open_sink(work, unit, writers, stack)))
            for made in make_batches(work, unit, missing, draw, begun[-1].sink, begun[-1].passes):
                progress.update(made)
                finish(1, wait=False)
            finish(1, wait=True)
        finish(0, wait=True)


class Begun(NamedTuple):
    """A unit of which all is drawn, or soon will be, and not all is written."""

    unit: range
    passes: dict[int, int]  # through the prior that samples took, where that is worth to be recorded
    left_out: set[int]  # by an earlier run
    sink: Sink
    opened: ExitStack

    def finish(self, work: Work, ends: Mapping[int, int]) -> None:
        self.opened.close()
        left_out = self.left_out | self.sink.left_out
        if work.layout.format == "tar":
            sizes = [LEFT_OUT if i in left_out else self.sink.sizes[i] for i in self.unit]
            record = Record(sizes, tar_size(work.store, work.layout, self.unit))
        else:
            found = zip(self.unit, sizes_of(work.store, work.layout, self.unit), strict=True)
            record = Record([LEFT_OUT if i in left_out else size for i, size in found])
            if any(size < 0 and i not in left_out for i, size in zip(self.unit, record.sizes, strict=True)):
                return  # somebody has taken one away again: the next run makes it
        write_record(work.store, self.unit, record)
        if self.passes:
            write_passes(work.store, self.unit, {**passes_of(work.store, self.unit), **self.passes})
        if ends.get(self.unit.start, self.unit.stop) != self.unit.stop:
            work.store.remove(record_name(range(self.unit.start, ends[self.unit.start])))


def open_sink(work: Work, unit: range, writers: Writers, until: ExitStack) -> tuple[Sink, ExitStack]:
    """The sink of a unit, and what closes it; `until` does, where something goes wrong before."""
    opened = until.enter_context(ExitStack())
    if work.layout.format == "tar":
        context = tar_of_unit(work.store, work.layout, unit, work.plan.lines(unit), work.form, writers)
    else:
        context = files_of_unit(work.store, work.layout, work.form, writers)
    return opened.enter_context(context), opened


def make_batches(
    work: Work, unit: range, missing: set[int], draw: Draw, sink: Sink, passes: dict[int, int]
) -> Iterator[int]:
    """Yields how many are made, batch after batch. passes: of samples, to which those of the batches are added."""
    for batch in batches(unit, work.batch_size):
        wanted = [i for i in batch if i in missing]
        if not wanted:
            continue
        if work.asked is None and batch.start == 0:  # a former one, of fewer images, was smaller
            wanted = [i for i in batch if i < unit.stop]
        of_batch = draw(batch, wanted, sink.take)
        if of_batch is not None:
            passes.update((i, number) for i, number in zip(batch, of_batch, strict=True) if i in wanted)
        sink.flush()
        yield len(wanted)


def is_complete(work: Work) -> bool:
    """Whether all units of the folder are recorded, those of other jobs among them."""
    ends = recorded_ends(work.store)
    return all(ends.get(unit.start, 0) >= unit.stop for unit in work._replace(part=None).units())


@contextmanager
def results_of(
    work: Work,
    command: str,
    settings: Mapping[str, Any],
    state: PartialState,
    defaults: Mapping[str, Any],
    may_change: Mapping[str, Callable[[], bool]],
    part: range | None = None,
    results: str = NUMBERED,
) -> Iterator[None]:
    """As `results_folder`, of a folder or a bucket. From here on no process waits for another: each keeps the folder as
    long as it lives."""
    if not isinstance(work.store, FolderStore):
        with results_bucket(work.store, command, settings, state, defaults, may_change):
            yield
        return
    folder = work.store.folder
    opened = results_folder(
        folder, command, settings, state, defaults=defaults, may_change=may_change, results=results, part=part
    )
    with ExitStack() as stack:
        stack.enter_context(opened)
        refused: UserError | None = None
        if not state.is_main_process:
            try:
                stack.enter_context(held_part(folder, command, part or ALL, state.process_index))
            except UserError as error:
                refused = error
        if state.num_processes > 1 and (errors := [error for error in gather_object([refused]) if error]):
            raise errors[0]
        yield


def make_missing(work: Work, draw: Draw, state: PartialState) -> Missing:
    """Makes this process's share of what is missing; the main process has looked what that is. Returns what it found.
    Raises UserError."""
    missing = on_main_process(state, lambda: shared(find_missing(work)))
    found = Missing(work._replace(plan=work.plan._replace(num=missing[0])), missing[1], missing[2])
    make_units(found.work, found.units[state.process_index :: state.num_processes], draw, shown=state.is_main_process)
    return found


def shared(missing: Missing) -> tuple[int, list[tuple[int, int]], int]:
    """What other processes need: the rest they have."""
    return missing.work.plan.num, missing.units, missing.images
