"""Work that one process does for all, and all processes do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training.errors import UserError

Result = TypeVar("Result")


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
