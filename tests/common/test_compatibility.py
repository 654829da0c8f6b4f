"""What is private of torch and Accelerate still does what is needed of it."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.compatibility import (
    end_workers,
    follow_all,
    forget_accelerator_settings,
    is_torchscript,
    tensor_of_storage,
)
from common.processes import process_state


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    forget_accelerator_settings()
    yield
    forget_accelerator_settings()


def test_a_second_accelerator_of_another_precision_works_once_the_first_is_forgotten():
    process_state()
    assert Accelerator(mixed_precision="no").mixed_precision == "no"
    with pytest.raises(ValueError, match="mixed_precision"):
        Accelerator(mixed_precision="bf16")  # what this is for: the day that it works, the module can go
    forget_accelerator_settings()
    assert Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2).mixed_precision == "bf16"
    forget_accelerator_settings()
    assert Accelerator(mixed_precision="no").gradient_accumulation_steps == 1


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def test_workers_end_at_once_while_their_iterator_lives():
    batches: Any = iter(DataLoader(Numbers(), batch_size=1, num_workers=2))
    next(batches)
    workers = list(batches._workers)
    assert all(worker.is_alive() for worker in workers)
    end_workers(batches)
    deadline = time.monotonic() + 20
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(worker.is_alive() for worker in workers)
    end_workers(batches)  # a second time is allowed
    alone = iter(DataLoader(Numbers(), batch_size=1))
    end_workers(alone)
    assert int(next(alone)) == 0  # without workers there is nothing to end


def test_all_averages_follow_their_weights_by_a_share():
    averages, weights = [torch.zeros(3), torch.ones(2, 2)], [torch.full((3,), 8.0), torch.full((2, 2), 5.0)]
    follow_all(averages, weights, 0.25)
    assert torch.equal(averages[0], torch.full((3,), 2.0))
    assert torch.equal(averages[1], torch.full((2, 2), 2.0))
    assert torch.equal(weights[0], torch.full((3,), 8.0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_told_from_other_files():
    program, tensors = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), program)
    torch.save({"weight": torch.zeros(2)}, tensors)
    assert is_torchscript(program.getvalue())
    assert not is_torchscript(tensors.getvalue())
    assert not is_torchscript(b"no archive at all")


def test_a_tensor_over_a_storage_has_its_offset_and_strides():
    storage = torch.arange(12.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    found = tensor_of_storage(typed, 1, (2, 3), (1, 2))
    assert torch.equal(found, torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]))
    assert not found.requires_grad
