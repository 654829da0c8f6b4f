"""Work that one process does for all, and all processes do together."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from common.compatibility import set_timeout
from common.errors import UserError

WAIT_MINUTES = 60.0  # for the other processes: torch's 10 of GPUs are few where one of them lists a million files
Result = TypeVar("Result")

# What accelerate launch can ask for, and how it tells: ways to spread one model over processes that nothing here has.
# FSDP is for trainings alone (training/launcher.py).
SPREAD = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def process_state(*, cpu: bool = False, timeout_minutes: float | None = None) -> PartialState:
    """This process's number, how many there are, and its device; `cpu` passes over a GPU that is there.

    timeout_minutes: how long, from now on, a process waits for the others in whatever they do together, and None what
    was said before, or WAIT_MINUTES.

    Call it before the first Accelerator. Under torchrun on a machine without GPUs Accelerate has to be told to
    use the CPU: otherwise it takes each process for the only one, and all of them write into one folder.

    Raises UserError where the launcher asks for a model that is spread over the processes.
    """
    for variable, name in SPREAD.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate launch asks for {name} ({variable}={os.environ[variable]}), which nothing here does: "
                "start it with accelerate launch --multi_gpu or with torchrun, each process holding the whole model; a "
                "training with accelerate launch --use_fsdp --fsdp_version 2, each holding a share of the weights; or "
                "on one GPU without a launcher"
            )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    only_cpu = accelerator is None or accelerator.type == "mps"  # no process group spans Apple GPUs
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # accelerate launch --cpu
    timeout = timedelta(minutes=WAIT_MINUTES if timeout_minutes is None else timeout_minutes)
    state = PartialState(cpu=cpu or ("LOCAL_RANK" in os.environ and only_cpu), timeout=timeout)
    if timeout_minutes is not None and state.num_processes > 1:
        set_timeout(timeout)  # the group may have been there before
    return state


def use_device(name: str | None, timeout_minutes: float | None = None) -> PartialState:
    """As `process_state`, with the device of that name, such as cpu, cuda or cuda:1, for all that the process computes
    from now on, trainings included; None: the fastest there is. Raises UserError for a device that is not there, and
    for one GPU that several processes would share."""
    state = process_state(cpu=name == "cpu", timeout_minutes=timeout_minutes)
    if name is None or name == state.device.type:
        return state  # of several processes on "cuda" each has its own GPU
    device = usable_device(name)
    if state.num_processes > 1:
        raise UserError(
            f"device {name!r} for {state.num_processes} processes, expected cpu, or {state.device.type}, of which "
            "each process has its own; leave device out"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    state.device = device
    return state


def usable_device(name: torch.device | str) -> torch.device:
    """Raises UserError for a device that is not there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(name)!r} cannot be used ({reason}); leave device out, or give one that is there: cpu is"
        ) from error
    return torch.device(name)


def on_main_process(accelerator: Accelerator | PartialState, work: Callable[[], Result]) -> Result:
    """Does `work` on the main process while the others wait. All get its result, or raise its UserError: a
    full disk ends every process with one sentence instead of leaving the others to wait for ever. Raises UserError,
    too, where they have waited for longer than their timeout."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except UserError as error:
            outcome = [error]
    try:
        broadcast_object_list(outcome)
    except RuntimeError as error:
        if "Timed out waiting" not in str(error):
            raise
        raise UserError(
            f"process {accelerator.process_index} has waited for the first one longer than processes wait for each "
            "other: where that has hours of work to do alone, such as unpacking a data set, give a training a larger "
            "--train.timeout_minutes; else it hangs, and its last lines tell where"
        ) from error
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def leave(code: int) -> NoReturn:
    """Ends the program with this exit code, when all its work is done.

    Under torchrun without the interpreter's own shutdown: about one time in twenty a thread of the process group still
    runs then, and aborts a process that has nothing left to do (torch 2.15, gloo), which fails the whole job.
    """
    if "LOCAL_RANK" in os.environ:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
