from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import closing

import pytest
import torch

from tests.training.toy import ToyData
from training.data import Loader, SampleOrder, Share, explain_dead_workers
from training.errors import UserError


def share(batch_size: int, accumulate: int = 1, processes: int = 1, process: int = 0) -> Share:
    return Share(batch_size=batch_size, accumulate=accumulate, processes=processes, process=process)


def test_every_epoch_shows_every_sample_once_in_another_order():
    order = SampleOrder(37, seed=1)
    epochs = [[index for index, _ in order.samples(range(37 * e, 37 * (e + 1)))] for e in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert SampleOrder(37, seed=2).samples(range(37)) != order.samples(range(37))


def test_a_range_over_the_end_of_an_epoch_is_the_two_parts_of_it():
    order = SampleOrder(10, seed=0)
    assert order.samples(range(7, 24)) == [s for draw in range(7, 24) for s in order.samples(range(draw, draw + 1))]


def test_data_sets_smaller_than_a_batch_repeat():
    assert sorted(index for index, _ in SampleOrder(3, seed=0).samples(range(9))) == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
    ]


def test_an_empty_training_set_is_refused():
    with pytest.raises(UserError, match="holds no samples"):
        SampleOrder(0, seed=0)


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (3, 1), (1, 4), (3, 4), (12, 2)])
def test_micro_batches_of_all_processes_tile_the_step(accumulate: int, processes: int):
    shares = [share(24, accumulate, processes, process) for process in range(processes)]
    for step in range(3):
        draws = [
            draw for micro in zip(*[s.draws(step) for s in shares], strict=True) for part in micro for draw in part
        ]
        assert draws == list(range(24 * step, 24 * (step + 1)))


def test_a_batch_that_cannot_be_shared_names_what_would_fit():
    with pytest.raises(UserError, match=r"batch_size=10 .* accumulate=2 .* 3 processes: choose a multiple of 6"):
        share(10, accumulate=2, processes=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_batches_asked_for_in_order(workers: int):
    data = ToyData(37)
    requests = [SampleOrder(37, 0).samples(range(5 * n, 5 * (n + 1))) for n in range(6)]
    loader = Loader(data, iter(requests), workers=workers, prefetch=2, device=torch.device("cpu"))
    batches = list(loader)
    assert [batch["draws"].tolist() for batch in batches] == [[draw for _, draw in r] for r in requests]
    for batch, request in zip(batches, requests, strict=True):
        torch.testing.assert_close(batch["x"], data.x[[index for index, _ in request]])
    assert loader.seconds_waited > 0


class Failing(ToyData):
    def __init__(self, how: str):
        super().__init__(8)
        self.how = how

    def fetch(self, indices, draws):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "crash":
            raise KeyError("a bug")
        raise UserError("3 of 8 files are bad: a.png, b.png, c.png")


def drain(data: ToyData, workers: int) -> None:
    with closing(Loader(data, [[(0, 0)]], workers=workers, prefetch=1, device=torch.device("cpu"))) as loader:
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_in_a_worker_keeps_its_sentence(workers: int):
    with pytest.raises(UserError, match=r"^3 of 8 files are bad: a\.png, b\.png, c\.png$"):
        drain(Failing("bad"), workers)


def test_a_dead_worker_is_explained():
    with pytest.raises(UserError, match=r"ran out of memory.*lower train\.workers"), explain_dead_workers():
        drain(Failing("killed"), workers=1)


@pytest.fixture
def new_children():
    """The processes that a test has started and that still run; other tests may have left some of theirs."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


def test_an_error_from_a_worker_leaves_none_behind(new_children):
    try:
        drain(Failing("crash"), workers=1)
    except KeyError as error:
        crash = error  # as a program's unhandled exception does, it keeps torch's iterator alive
    assert "in fetch" in str(crash)  # the worker's traceback
    assert not new_children()


def test_closing_an_unfinished_loader_ends_its_workers(new_children):
    requests = ([(0, draw)] for draw in range(10**9))
    loader = Loader(ToyData(8), requests, workers=2, prefetch=2, device=torch.device("cpu"))
    assert not new_children()  # none before they are needed
    next(loader)
    assert len(new_children()) == 2
    loader.close()
    assert not new_children()


def test_loading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(Loader(ToyData(8), [[(0, 0)]], workers=0, prefetch=1, device=torch.device("cpu")))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
