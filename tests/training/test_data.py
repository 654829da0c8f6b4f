from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import closing

import numpy as np
import pytest
import torch

from common.errors import UserError
from tests.training.toy import ToyData
from training.data import (
    MIXED,
    BlockOrder,
    GroupedOrder,
    Loader,
    MixedOrder,
    Mixture,
    SampleOrder,
    Share,
    batches_of,
    explain_dead_workers,
    sample_order,
)


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
    with pytest.raises(UserError, match="holds no samples"):
        GroupedOrder(np.zeros(0, dtype=np.int64), 8, seed=0)


# ---- groups, by eights ----------------------------------------------------------------------------------------------

GROUP_SIZES = [(37,), (16, 16), (50, 23, 9, 8), (61, 3, 1)]
each_grouping = pytest.mark.parametrize("sizes", GROUP_SIZES)


def grouping(sizes: tuple[int, ...]) -> np.ndarray:
    """The group of each sample, shuffled; 5, 6 ... rather than 0, 1 ..."""
    return np.random.default_rng(0).permutation(np.repeat(5 + np.arange(len(sizes)), sizes))


def test_samples_of_a_block_stand_near_one_another_and_an_epoch_shows_all_once():
    blocks = np.repeat(np.arange(1000), np.random.default_rng(0).integers(5, 15, 1000))
    order, size = BlockOrder(blocks, seed=1), len(blocks)
    epochs = [[index for index, _ in order.samples(range(e * size, (e + 1) * size))] for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
        places = np.argsort(epoch)
        spread = [np.ptp(places[blocks == block]) for block in range(0, 1000, 20)]
        assert max(spread) < 1.3 * MIXED * size / 1000
        batches = [len(set(blocks[epoch[start : start + 256]])) for start in range(0, size - 256, 256)]
        assert min(batches) > 40  # of some 25 blocks' samples, not those of 25 blocks alone
        assert max(batches) < 2 * MIXED
    assert epochs[0] != epochs[1]
    assert order.samples(range(5, 9)) == BlockOrder(blocks, seed=1).samples(range(5, 9))
    assert order.samples(range(5, 9)) != BlockOrder(blocks, seed=2).samples(range(5, 9))
    few = BlockOrder(np.array([7, 7, 9]), seed=0)
    assert sorted(index for index, _ in few.samples(range(3))) == [0, 1, 2]
    with pytest.raises(UserError, match="holds no samples"):
        BlockOrder(np.zeros(0, dtype=np.int64), seed=0)


def step_of(order: GroupedOrder, step: int) -> list[int]:
    return [index for index, _ in order.samples(range(8 * step, 8 * (step + 1)))]


@each_grouping
def test_every_step_is_of_one_group(sizes):
    groups = grouping(sizes)
    order = GroupedOrder(groups, 8, seed=0)
    taken = [groups[step_of(order, step)] for step in range(100)]
    assert all((of_step == of_step[0]).all() for of_step in taken)
    assert {of_step[0] for of_step in taken} == set(groups)
    assert [draw for _, draw in order.samples(range(16, 24))] == list(range(16, 24))


@each_grouping
def test_a_group_shows_all_its_samples_before_it_shows_one_again(sizes):
    groups = grouping(sizes)
    order = GroupedOrder(groups, 8, seed=0)
    shown: dict[int, list[int]] = {}
    for step in range(200):
        samples = step_of(order, step)
        shown.setdefault(groups[samples[0]], []).extend(samples)
    for group, row in shown.items():
        members = np.flatnonzero(groups == group)
        rounds = [row[start : start + len(members)] for start in range(0, len(row), len(members))]
        assert all(sorted(whole) == members.tolist() for whole in rounds[:-1])
        assert len(set(rounds[-1])) == len(rounds[-1])
        assert len(members) < 8 or rounds[0] != rounds[1] != rounds[2]


def test_groups_take_turns_at_random_in_every_epoch():
    groups = grouping((64, 64))
    order = GroupedOrder(groups, 8, seed=0)
    epochs = [[int(groups[step_of(order, step)[0]]) for step in range(16 * e, 16 * (e + 1))] for e in range(3)]
    assert all(sorted(turns) == 8 * [5] + 8 * [6] for turns in epochs)
    assert sorted(epochs[0]) != epochs[0] != epochs[1] != epochs[2]


def test_after_e_epochs_each_sample_has_been_seen_e_times_or_once_less():
    sizes = (50, 23, 9, 8)
    order, counts, step = GroupedOrder(grouping(sizes), 8, seed=0), np.zeros(90, dtype=np.int64), 0
    for epoch in range(1, 40):
        while step < sum(epoch * size // 8 for size in sizes):
            np.add.at(counts, step_of(order, step), 1)
            step += 1
        assert epoch - 1 <= counts.min() <= counts.max() <= epoch


def test_a_group_smaller_than_a_batch_is_seen_as_often_as_any_other():
    order = GroupedOrder(grouping((61, 2, 1)), 8, seed=0)
    counts = np.bincount([index for step in range(8 * 64) for index in step_of(order, step)])
    assert counts.tolist() == 64 * [64]  # 64 epochs of 8 steps, in which each group comes out even


@each_grouping
def test_a_step_can_be_asked_for_by_itself_and_in_parts(sizes):
    groups = grouping(sizes)
    order = GroupedOrder(groups, 8, seed=3)
    steps = [order.samples(range(8 * step, 8 * (step + 1))) for step in range(60)]
    for step in np.random.default_rng(0).permutation(60):
        fresh = GroupedOrder(groups, 8, seed=3)
        assert fresh.samples(range(8 * step, 8 * (step + 1))) == steps[step]
        assert order.samples(range(8 * step + 2, 8 * step + 5)) == steps[step][2:5]
    assert order.samples(range(5, 45)) == [sample for step in steps for sample in step][5:45]
    other = GroupedOrder(groups, 8, seed=4)
    assert [step_of(other, step) for step in range(60)] != [[index for index, _ in step] for step in steps]


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_share_the_group_of_their_step(accumulate: int, processes: int):
    groups = grouping((50, 23, 9, 8))
    shares = [share(8, accumulate, processes, process) for process in range(processes)]
    orders = [GroupedOrder(groups, 8, seed=0) for _ in range(processes)]
    for step in range(20):
        parts = [order.samples(draws) for order, s in zip(orders, shares, strict=True) for draws in s.draws(step)]
        together = sorted((sample for part in parts for sample in part), key=lambda sample: sample[1])
        assert together == orders[0].samples(range(8 * step, 8 * (step + 1)))
        assert len({groups[index] for index, _ in together}) == 1


def test_a_dataset_says_whether_it_has_groups():
    data = ToyData(37)
    assert isinstance(sample_order(data, 8, seed=0), SampleOrder)
    assert list(batches_of(data, range(3, 10), 3)) == [[3, 4, 5], [6, 7, 8], [9]]
    data.groups = np.arange(37) % 2
    assert isinstance(sample_order(data, 8, seed=0), GroupedOrder)
    assert list(batches_of(data, range(3, 10), 3)) == [[3, 5, 7], [9], [4, 6, 8]]


# ---- shares and loader ----------------------------------------------------------------------------------------------


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


def test_more_workers_than_cores_are_not_warned_of(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 1)
    with closing(Loader(ToyData(4), [[(0, 0)]], workers=2, prefetch=1, device=torch.device("cpu"))) as loader:
        assert len(list(loader)) == 1
    assert not [str(warning.message) for warning in recwarn]


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


@pytest.mark.parametrize("taken", [1, 4])  # of four batches
def test_a_repeated_loader_goes_on_with_the_same_workers(new_children, taken: int):
    requests = [[(index, index)] for index in range(4)]
    loader = Loader(ToyData(8), requests, workers=1, prefetch=1, device=torch.device("cpu"), repeated=True)
    for _ in range(taken):
        next(loader)
    first = new_children()
    assert len(first) == 1
    assert [batch["draws"].tolist() for batch in loader.again()] == [[0], [1], [2], [3]]
    assert new_children() == first
    loader.close()
    assert not new_children()


def test_a_repeated_loader_without_workers_begins_anew():
    loader = Loader(ToyData(8), [[(5, 5)]], workers=0, prefetch=1, device=torch.device("cpu"), repeated=True)
    assert [len(list(loader.again())) for _ in range(3)] == [1, 1, 1]


def test_loading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(Loader(ToyData(8), [[(0, 0)]], workers=0, prefetch=1, device=torch.device("cpu")))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


# ---- two kinds in every batch ---------------------------------------------------------------------------------------


def mixed(batch_size: int, seed: int = 0) -> MixedOrder:
    """Samples 0, 10, 20, 30 and 40 of 50 are the members, a quarter of each batch."""
    return MixedOrder(Mixture(np.arange(50) % 10 == 0, 0.25), batch_size, seed)


def test_every_batch_holds_so_many_of_each_kind_and_so_do_its_parts():
    order = mixed(16)
    for step in range(30):
        members = [index % 10 == 0 for index, _ in order.samples(range(16 * step, 16 * step + 16))]
        assert sum(members) == 4
        assert all(sum(members[start : start + 4]) == 1 for start in range(0, 16, 4))


def test_each_kind_shows_all_its_samples_before_it_shows_one_again():
    drawn = [index for index, _ in mixed(16).samples(range(16 * 15))]
    members, others = [i for i in drawn if i % 10 == 0], [i for i in drawn if i % 10]
    assert all(sorted(members[start : start + 5]) == [0, 10, 20, 30, 40] for start in range(0, 60, 5))
    assert all(len(set(others[start : start + 45])) == 45 for start in range(0, 180, 45))
    assert members[:5] != members[5:10]


def test_what_a_draw_of_a_mixture_is_depends_on_its_number_and_the_seed_alone():
    order, whole = mixed(8), mixed(8).samples(range(400))
    assert [order.samples(range(draw, draw + 1))[0] for draw in reversed(range(400))] == whole[::-1]
    assert mixed(8, seed=1).samples(range(400)) != whole


def test_a_mixture_leaves_room_for_both_kinds():
    assert [Mixture(np.ones(1, bool), share).count(10) for share in (0.01, 0.34, 0.99)] == [1, 3, 9]
    with pytest.raises(UserError, match=r"train\.batch_size=1, expected at least 2"):
        mixed(1)
