"""Who writes a checkpoint, and when: whole ones the main process, of shares all processes together; at once, or beside
the steps that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import ProcessGroup

from common.errors import UserError, explain_disk_errors
from common.files import atomic_folder
from common.processes import on_main_process
from training.checkpoint import SHARES_NAME, Checkpoints, complete

Parts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by their names, in parts by theirs: one file each where they are whole."""


class Saver:
    """Writes the checkpoints of one run. What it raises, all processes raise alike: in the background, when the next
    one is due or at the end."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        accelerator: Accelerator,
        *,
        shares: bool,
        background: bool,
        timeout_minutes: float,
    ) -> None:
        """timeout_minutes: how long processes that write together wait for each other."""
        self.checkpoints, self.accelerator = checkpoints, accelerator
        # Of its own: a thread must not send between the messages of a step. It does not wait as long as the group of
        # all by itself, but for torch's 30 minutes, which checksums of large files on a slow disk may take.
        timeout = timedelta(minutes=timeout_minutes)
        self.group = cast(ProcessGroup, dist.new_group(backend="gloo", timeout=timeout)) if shares else None
        self.worker = ThreadPoolExecutor(1, "checkpoint") if background else None
        self.pending: Future[None] | None = None

    def save(self, step: int, tensors: Parts, state: Any, best_step: int | None) -> None:
        """As `Checkpoints.save`. In the background tensors are copied first, and may change when this returns."""
        self.wait()
        if self.worker is None:
            if self.group is not None:
                self._write_shares(step, tensors, state, best_step)
            else:
                on_main_process(self.accelerator, lambda: self.checkpoints.save(step, tensors, state, best_step))
        elif self.group is not None:
            self.pending = self.worker.submit(self._write_shares, step, in_main_memory(tensors), state, best_step)
        elif self.accelerator.is_main_process:
            self.pending = self.worker.submit(self.checkpoints.save, step, in_main_memory(tensors), state, best_step)

    def wait(self) -> None:
        """Returns when what was given to `save` is on the disk. All processes call it together."""
        if self.worker is None:
            return
        pending, self.pending = self.pending, None
        if self.group is None:
            on_main_process(self.accelerator, lambda: None if pending is None else pending.result())
        elif pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread, when it has written what it was given. It raises nothing: `wait` does."""
        if self.worker is not None:
            self.worker.shutdown()

    def _write_shares(self, step: int, tensors: Parts, state: Any, best_step: int | None) -> None:
        from training.sharded_checkpoint import write_shares  # takes seconds to import

        path = self.checkpoints.path(step)
        with explain_disk_errors(path), ExitStack() as stack:
            folder = Path(self._on_main_process(lambda: str(stack.enter_context(atomic_folder(path)))))
            assert self.group is not None
            write_shares(folder / SHARES_NAME, tensors, self.group)

            def end() -> None:
                complete(folder, state, shares=tensors)
                stack.close()  # it takes its name
                self.checkpoints.remove_others(step, best_step)

            self._on_main_process(end)

    def _on_main_process(self, work: Callable[[], Any]) -> Any:
        """As `on_main_process`, in the group of this saver."""
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [work()]
            except (UserError, OSError) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, group=self.group, device=torch.device("cpu"))
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def in_main_memory(tensors: Parts) -> dict[str, dict[str, Tensor]]:
    """Copies, which training does not change."""
    return {
        part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in group.items()}
        for part, group in tensors.items()
    }
