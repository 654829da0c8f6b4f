"""Where a command computes: the fastest device there is, or the one that was asked for."""

from __future__ import annotations

import torch
from accelerate import PartialState

from common.errors import UserError
from common.processes import process_state


def open_device(name: str | None) -> tuple[PartialState, torch.device]:
    """This process among those of the command, and its device. Raises UserError for a device that is not there."""
    state = process_state(cpu=name == "cpu")
    if name is None or name == state.device.type:
        return state, state.device  # of several processes on "cuda" each has its own GPU
    return state, usable_device(name)


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
