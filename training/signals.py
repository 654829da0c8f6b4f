"""SIGINT, SIGTERM and SIGUSR1 ask a run to stop after its step; a second SIGINT stops it at once.

SIGTERM is how schedulers end a job, SIGUSR1 how SLURM says beforehand that time is nearly up (`--signal=USR1@90`).
"""

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

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


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
    """Collects STOP_SIGNALS while the block runs. Outside the main thread Python delivers no signals,
    and the request is never made."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def outlive_stop_signals() -> None:
    """For data loader workers: a signal to all processes of a job must leave them working until the step is done.

    They outlive SIGTERM by a minute and not for ever, because it is also how a training process that crashed ends them.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


def this_command() -> str:
    """The command line that started this process, ready to be pasted: giving it again continues a run."""
    program, words = Path(sys.argv[0]), sys.argv[1:]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # set by torchrun and accelerate launch
    ours = program.stem == "zellige" or program.parts[-2:] in (("zellige", "__main__.py"), ("pipelines", "__main__.py"))
    if processes != "1" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        words = words[1:] if words[:1] == ["--"] else words
        kept = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
        asked = ["--use_fsdp", "--fsdp_version", "2", *(["--fsdp_reshard_after_forward", "false"] if kept else [])]
        module = ["-m", "zellige"] if ours else [str(program)]
        return shlex.join(["accelerate", "launch", *asked, "--num_processes", processes, *module, *words])
    if ours and processes == "1":
        return shlex.join(["zellige", *words])
    if ours:  # torchrun takes --run for an option of its own unless a bare -- stands before
        words = words[1:] if words[:1] == ["--"] else words
        return shlex.join(["torchrun", "--nproc_per_node", processes, "-m", "zellige", "--", *words])
    launcher = ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]
    return shlex.join([*launcher, str(program), *words])
