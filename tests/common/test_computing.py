from collections.abc import Iterator

import pytest
import torch

from common import computing
from common.computing import beside_workers


@pytest.fixture(autouse=True)
def three_threads_on_four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(computing, "cores", lambda: 4)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("workers", "device", "left"), [(0, "cpu", 3), (1, "cpu", 3), (2, "cpu", 2), (8, "cpu", 1), (2, "cuda", 3)]
)
def test_a_network_on_a_cpu_leaves_workers_their_cores(workers: int, device: str, left: int) -> None:
    with beside_workers(workers, torch.device(device)):
        assert torch.get_num_threads() == left
    assert torch.get_num_threads() == 3


def test_threads_are_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), beside_workers(2, torch.device("cpu")):
        _ = 1 / 0
    assert torch.get_num_threads() == 3
