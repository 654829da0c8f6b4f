"""Where a command computes: the fastest device there is, or the one that was asked for."""

from __future__ import annotations

import torch
from accelerate import PartialState

from common.processes import process_state, usable_device
from training.launcher import check_launcher_of_models


def open_device(name: str | None) -> tuple[PartialState, torch.device]:
    """This process among those of the command, and its device. Raises UserError for a device that is not there, and
    for a launcher that asks for what is done in trainings only."""
    check_launcher_of_models()
    state = process_state(cpu=name == "cpu")
    if name is None or name == state.device.type:
        return state, state.device  # of several processes on "cuda" each has its own GPU
    return state, usable_device(name)
