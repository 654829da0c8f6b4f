"""Where a process computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_a_launcher_that_would_spread_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, name: str):
    monkeypatch.setenv(variable, "false")
    process_state()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"^accelerate launch asks for {name} \({variable}=true\), .* --multi_gpu"):
        process_state()


@pytest.mark.parametrize(("flag", "cpu"), [("True", True), ("False", False), (None, False)])
def test_a_launcher_that_asks_for_the_cpu_is_obeyed(monkeypatch: pytest.MonkeyPatch, flag: str | None, cpu: bool):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("common.processes.PartialState", lambda cpu, timeout: asked.append({"cpu": cpu}))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if flag is None:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    process_state()
    assert asked == [{"cpu": cpu}]
