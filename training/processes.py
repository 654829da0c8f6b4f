"""Work that one process does for all, and all processes do together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from training.errors import UserError

Result = TypeVar("Result")


def process_state(*, cpu: bool = False) -> PartialState:
    """This process's number, how many there are, and its device; `cpu` passes over a GPU that is there.

    Call it before the first Accelerator. Under torchrun on a machine without GPUs Accelerate has to be told to
    use the CPU: otherwise it takes each process for the only one, and all of them write into one folder.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    only_cpu = accelerator is None or accelerator.type == "mps"  # no process group spans Apple GPUs
    state = PartialState(cpu=cpu or ("LOCAL_RANK" in os.environ and only_cpu))
    if state.use_distributed:
        # Its threads must end before the interpreter does, or now and then a finished process aborts.
        atexit.unregister(close_process_group)
        atexit.register(close_process_group)
    return state


def close_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Does `work` on the main process while the others wait. All get its result, or raise its UserError: a
    full disk ends every process with one sentence instead of leaving the others to wait for ever."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
