"""Where a process computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator

from common.compatibility import forget_accelerator_settings
from common.errors import UserError
from common.processes import process_state, use_device


@pytest.fixture(autouse=True)
def same_device_afterwards() -> Iterator[None]:
    before = process_state().device
    forget_accelerator_settings()
    yield
    process_state().device = before
    forget_accelerator_settings()


def test_the_device_that_was_asked_for_is_that_of_the_process_and_of_accelerators():
    other = torch.device("meta")  # the one besides the CPU that every machine has
    assert use_device("meta").device == other
    assert process_state().device == other
    assert Accelerator().device == other
    assert use_device("cpu").device == torch.device("cpu")


def test_none_leaves_the_choice_to_the_machine():
    assert use_device(None).device == process_state().device


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=rf"device '{name}' cannot be used \(.+\); leave device out"):
        use_device(name)


def test_several_processes_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setattr(process_state(), "num_processes", 2)
    with pytest.raises(UserError, match="device 'meta' for 2 processes, expected cpu, or "):
        use_device("meta")
