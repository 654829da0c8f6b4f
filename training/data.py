"""Which samples a step sees, as a function of the step alone, and a loader that fetches them ahead.

Every epoch is a fresh permutation; the epochs stand one after another in an endless row of draws, and step s
takes draws [s * batch_size, (s + 1) * batch_size), also across the end of an epoch. So nothing about the
position in the data needs saving, and neither restarts nor workers, processes or accumulation change what a
step sees. Where not all samples fit into one batch, images of several shapes say, each group of those that do
has such a row of its own, and every step takes its samples from one of them. Where samples are fetched by blocks of
many, an epoch goes through these, and mixes those that stand together. Where rare samples are to have a part of every
batch, they and the others have such rows, and every step takes so many samples from each of the two.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from common.compatibility import end_workers
from common.errors import UserError
from training.signals import outlive_stop_signals
from training.task import Batch, Dataset

MIXED = 64  # blocks of samples that are mixed

Sample = tuple[int, int]
"""Index into the dataset, and number of the draw in the whole run."""


class SampleOrder:
    """The endless row of draws over `size` samples, for one seed."""

    def __init__(self, size: int, seed: int):
        check_not_empty(size)
        self.size = size
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)  # a batch touches one epoch, or two at its end

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)

    def samples(self, draws: range) -> list[Sample]:
        return [(int(self._epoch(draw // self.size)[draw % self.size]), draw) for draw in draws]


class BlockOrder:
    """The endless row of draws over samples in blocks, such as row groups of parquet files, which are fetched as a
    whole: near one another are samples of few blocks.

    An epoch goes through the blocks in random order, and moves each of their samples back by a random number of up to
    `MIXED` blocks. So a block is needed for a while and then not again before the next epoch, and what stands in a
    batch is of about `MIXED` blocks.
    """

    def __init__(self, blocks: NDArray[np.int64], seed: int):
        """blocks: n, the block of each sample."""
        check_not_empty(len(blocks))
        self.size, self.seed = len(blocks), seed
        self.blocks = np.unique(blocks, return_inverse=True)[1]
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        chance = np.random.default_rng([self.seed, epoch])
        ranks = chance.permutation(int(self.blocks.max()) + 1)[self.blocks]
        return np.argsort(ranks + MIXED * chance.random(self.size), kind="stable")

    def samples(self, draws: range) -> list[Sample]:
        return [(int(self._epoch(draw // self.size)[draw % self.size]), draw) for draw in draws]


class GroupedOrder:
    """The endless row of draws over samples in groups: draws [s * batch_size, (s + 1) * batch_size) are of one group.

    Each group has its own endless row of permutations, cut into batches, also across the end of a permutation: it shows
    all its samples before it shows one again. Epoch e, counted from 0, takes the batches
    [e * size // batch_size, (e + 1) * size // batch_size) of a group of `size` samples, and the groups take turns at
    random: what does not fill a batch waits for the next epoch. So when e epochs are over, each sample has been seen e
    or e - 1 times, and no group more often than its size deserves. (A group smaller than a batch waits until a batch is
    due, and fills it by repetition.)
    """

    def __init__(self, groups: NDArray[np.int64], batch_size: int, seed: int):
        """groups: n, the group of each sample."""
        check_not_empty(len(groups))
        self.size, self.batch_size, self.seed = len(groups), batch_size, seed
        self.members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self._epoch = lru_cache(maxsize=2)(self._batches)
        self._round = lru_cache(maxsize=2 * len(self.members))(self._permutation)
        self._step = lru_cache(maxsize=2)(self._indices)  # the micro-batches of a step follow one another

    def samples(self, draws: range) -> list[Sample]:
        steps = range(draws.start // self.batch_size, (draws.stop - 1) // self.batch_size + 1)
        row = np.concatenate([self._step(step) for step in steps])
        first = draws.start - steps.start * self.batch_size
        return list(zip(row[first : first + len(draws)].tolist(), draws, strict=True))

    def _indices(self, step: int) -> NDArray[np.int64]:
        """The samples of a step: batch_size of one group."""
        epoch = self._epoch_of(step)
        group, number = self._epoch(epoch)[step - self._batches_before(epoch)]
        size, start, stop = len(self.members[group]), number * self.batch_size, (number + 1) * self.batch_size
        rounds = range(start // size, (stop - 1) // size + 1)
        return np.concatenate([self._round(group, r)[max(start - r * size, 0) : stop - r * size] for r in rounds])

    def _permutation(self, group: int, number: int) -> NDArray[np.int64]:
        """Round `number` of a group: all its samples, once."""
        return np.random.default_rng([self.seed, number, group + 1]).permutation(self.members[group])

    def _batches(self, epoch: int) -> list[tuple[int, int]]:
        """The batches of an epoch in the order of its steps: group, and number of the batch in the group's row."""
        sizes = np.array([len(members) for members in self.members])
        first, end = epoch * sizes // self.batch_size, (epoch + 1) * sizes // self.batch_size
        turns = np.random.default_rng([self.seed, epoch]).permutation(np.repeat(np.arange(len(sizes)), end - first))
        rows = [itertools.count(int(number)) for number in first]
        return [(group, next(rows[group])) for group in turns.tolist()]

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * len(members) // self.batch_size for members in self.members)

    def _epoch_of(self, step: int) -> int:
        epoch = step * self.batch_size // self.size  # or a later one: what waits for the next epoch makes room
        while self._batches_before(epoch + 1) <= step:
            epoch += 1
        return epoch


class Mixture(NamedTuple):
    """Samples that have a part of every batch to themselves, and the others, of which there is at least one."""

    members: NDArray[np.bool_]  # n
    share: float  # of a batch, above 0 and below 1

    def count(self, batch_size: int) -> int:
        """How many of a batch of two or more samples are members: at least one, and not all."""
        return min(max(1, round(self.share * batch_size)), batch_size - 1)


class MixedOrder:
    """The endless row of draws over samples of two kinds, members of a mixture and others: each batch holds so many of
    one and of the other, spread evenly, so that parts of a batch are mixed alike. Each kind has its own endless row of
    permutations."""

    def __init__(self, mixture: Mixture, batch_size: int, seed: int):
        if batch_size < 2:
            raise UserError(
                f"train.batch_size={batch_size}, expected at least 2: every batch holds images of two kinds"
            )
        self.batch_size = batch_size
        self.kinds = [np.flatnonzero(~mixture.members), np.flatnonzero(mixture.members)]
        count = mixture.count(batch_size)
        self.counts = [batch_size - count, count]  # of a batch
        reached = np.arange(batch_size + 1) * count // batch_size  # members before each place of a batch
        self.kind_at = np.diff(reached)  # batch_size, 0 or 1
        self.rank_at = np.where(self.kind_at == 1, reached[:-1], np.arange(batch_size) - reached[:-1])
        self.rows = [SampleOrder(len(kind), seed + number * 2**32) for number, kind in enumerate(self.kinds)]

    def samples(self, draws: range) -> list[Sample]:
        return [(self.sample(draw), draw) for draw in draws]

    def sample(self, draw: int) -> int:
        step, place = divmod(draw, self.batch_size)
        kind = self.kind_at[place]
        number = step * self.counts[kind] + int(self.rank_at[place])  # in the row of its kind
        index, _ = self.rows[kind].samples(range(number, number + 1))[0]
        return int(self.kinds[kind][index])


def sample_order(dataset: Dataset, batch_size: int, seed: int) -> SampleOrder | BlockOrder | GroupedOrder | MixedOrder:
    """What a run of this seed draws from `dataset`. Raises UserError for an empty one."""
    mixture: Mixture | None = getattr(dataset, "mixture", None)
    if mixture is not None:
        return MixedOrder(mixture, batch_size, seed)
    if (groups := groups_of(dataset)) is not None:
        return GroupedOrder(groups, batch_size, seed)
    blocks: NDArray[np.int64] | None = getattr(dataset, "blocks", None)
    return SampleOrder(len(dataset), seed) if blocks is None else BlockOrder(blocks, seed)


def groups_of(dataset: Dataset) -> NDArray[np.int64] | None:
    """Which samples may share a batch (training/task.py); None: all."""
    return getattr(dataset, "groups", None)


def batches_of(dataset: Dataset, indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`indices` in batches of up to `size`, each of one group."""
    groups = groups_of(dataset)
    together: dict[int, list[int]] = {}
    for index in indices:
        together.setdefault(0 if groups is None else int(groups[index]), []).append(index)
    for group in together.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def check_not_empty(size: int) -> None:
    if size < 1:
        raise UserError("the training set holds no samples, expected at least one; check the data's path")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process does of every step: `accumulate` micro-batches of `size` samples."""

    batch_size: int  # samples per step, over all processes
    accumulate: int
    processes: int
    process: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.accumulate * self.processes):
            raise UserError(
                f"train.batch_size={self.batch_size} cannot be split into accumulate={self.accumulate} "
                f"micro-batches on {self.processes} processes: choose a multiple of "
                f"{self.accumulate * self.processes}"
            )

    @property
    def size(self) -> int:
        """Samples of one micro-batch on this process."""
        return self.batch_size // (self.accumulate * self.processes)

    def draws(self, step: int) -> list[range]:
        """Draws of this process's micro-batches in step `step`, counted from 0: of each micro-batch its own slice."""
        together = self.size * self.processes
        starts = (step * self.batch_size + micro * together for micro in range(self.accumulate))
        return [range(start + self.process * self.size, start + (self.process + 1) * self.size) for start in starts]


class Loader(Iterator[Batch]):
    """The batches of `requests`, on `device`; counts the seconds spent waiting for them. Close it after use.

    workers: processes that fetch ahead, `prefetch` batches each; 0 fetches when asked. repeated: `requests` may be gone
    through `again` and again, and workers stay from one time to the next.
    """

    def __init__(
        self,
        dataset: Dataset,
        requests: Iterable[list[Sample]],
        *,
        workers: int,
        prefetch: int,
        device: torch.device,
        repeated: bool = False,
    ):
        self.seconds_waited = 0.0
        self.dataset, self.device = dataset, device
        # More workers than cores are no fault, as they wait for disks: `zellige profile` tells of too many.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        self.loader: DataLoader[Batch | UserError] = DataLoader(
            _Fetch(dataset),  # type: ignore[arg-type]
            batch_sampler=requests,
            collate_fn=_as_fetched,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_start_worker,
            persistent_workers=repeated and workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its seed reaches workers only; the global generator is left alone
        )
        self._batches: Iterator[Batch | UserError] | None = None  # workers start when a batch is asked for

    def __iter__(self) -> Iterator[Batch]:
        return self

    def again(self) -> Self:
        """From the first batch on."""
        self._batches = iter(self.loader)
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self.loader)
        try:
            batch = next(self._batches)
        except (EOFError, OSError) as error:  # a worker that dies takes along what it has sent
            ends = [worker.sentinel for worker in getattr(self._batches, "_workers", ())]
            if not wait(ends, timeout=2):  # its connections are closed a moment before it has ended
                raise
            raise dead_worker(error) from error
        if isinstance(batch, UserError):
            raise batch
        batch = send_to_device(batch, self.device, non_blocking=True)
        self.seconds_waited += time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """Ends the workers, also while an exception that came from them keeps their iterator alive."""
        if self._batches is not None:
            end_workers(self._batches)


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Turns the death of a data loader worker, of which torch tells at any moment, into a UserError; what fails in the
    middle of a batch for want of a worker is one already."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise dead_worker(error) from error


def dead_worker(error: Exception) -> UserError:
    said = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"a data loader worker died ({said}): it ran out of memory, or of shared memory in a container; lower "
        "train.workers or train.prefetch, or give more (docker run --shm-size)"
    )


class _Fetch:
    """The face of a Dataset that DataLoader knows: `__getitems__` takes a whole batch at once."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, samples: list[Sample]) -> Batch | UserError:
        indices, draws = zip(*samples, strict=True)
        try:
            return self.dataset.fetch(indices, draws)
        except UserError as error:
            return error  # raised by Loader: a worker would bury its sentence in a traceback


def _as_fetched(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    outlive_stop_signals()
