"""SIGINT and SIGTERM ask a run to stop after its step; a second SIGINT stops it at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Collects SIGINT and SIGTERM while the block runs. Outside the main thread Python delivers no signals,
    and the request is never made."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """For data loader workers: a signal to the whole process group must leave them working until the step is
    done. They end when the training process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def this_command() -> str:
    """The command line that started this process, ready to be pasted: giving it again continues a run."""
    program = Path(sys.argv[0])
    if program.stem == "zellige":
        words = ["zellige", *sys.argv[1:]]
        module = ["-m", "pipelines", *sys.argv[1:]]
    elif program.parts[-2:] == ("pipelines", "__main__.py"):
        words = ["python", "-m", "pipelines", *sys.argv[1:]]
        module = words[1:]
    else:
        words = ["python", *sys.argv]
        module = words[1:]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    if processes is not None and processes != "1":
        words = ["torchrun", "--nproc_per_node", processes, *module]
    return shlex.join(words)
