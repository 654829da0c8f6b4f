"""Real processes for tests, each with a pid, an output and an end of its own, at the price of a fork.

A fresh Python takes seconds to import torch. Here a server is forked from the test process when its tests are
collected: all is imported by then, and no thread of torch has started. For each process that a test asks for it forks
once more, in some hundredths of a second.

    def test_something(processes, tmp_path):
        training = processes.zellige("train-stage1", "--config", "mnist_vqvae", ...)
        training.kill()
        assert training.wait() == -9
        processes.together(train_stage1, config, run, count=2)  # as torchrun would start two
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image

# What a command imports when it runs, so that no process has to.
PRELOADED = (
    "attrs",
    "docstring_parser",
    "einops._torch_specific",
    "torch._dynamo",
    "zellige.__main__",
    "pipelines.cli",
    *(f"pipelines.commands.{path.stem}" for path in Path(__file__).parents[1].glob("pipelines/commands/[a-z]*.py")),
    "pipelines.report.report",
)
FORK = get_context("fork")


class Process:
    """A process of a test. `stdout` and `stderr` are what it has written so far."""

    def __init__(self, server: Processes, pid: int, folder: Path) -> None:
        self.server, self.pid, self.folder = server, pid, folder

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def is_running(self) -> bool:
        self.server.hear(0)
        return self.pid not in self.server.ended

    def signal(self, number: int) -> None:
        if self.is_running():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait_until_stopped(self, seconds: float = 60) -> None:
        """Until a SIGSTOP has reached it. Fails the test if it ends before."""
        deadline = time.monotonic() + seconds
        while self.is_running() and Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"process {self.pid} was not stopped in {seconds} s"
            time.sleep(0.01)
        assert self.is_running(), (self.stdout, self.stderr)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def wait(self, seconds: float = 60) -> int:
        """The exit code, or minus the signal's number. Fails the test after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.pid not in self.server.ended:
            left = deadline - time.monotonic()
            assert left > 0, f"process {self.pid} has not ended in {seconds} s; {self.stdout} {self.stderr}"
            self.server.hear(left)
        return self.server.ended[self.pid]

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Until its output has `text`. Fails the test if it ends without, or does not say so in time."""
        deadline = time.monotonic() + seconds
        while text not in self.stdout:
            running = self.is_running()
            assert text in self.stdout or (running and time.monotonic() < deadline), (text, self.stdout, self.stderr)
            time.sleep(0.01)

    def succeed(self, seconds: float = 60) -> str:
        """Waits for it and returns its output. Fails the test unless the exit code is 0."""
        code = self.wait(seconds)
        assert code == 0, f"exit code {code}: {self.stdout}\n{self.stderr}"
        return self.stdout


class Processes:
    """The server's other end, in the test process."""

    def __init__(self) -> None:
        self.connection, theirs = FORK.Pipe()
        self.folder = Path(tempfile.mkdtemp(prefix="zellige-processes-"))
        self.ended: dict[int, int] = {}
        self.started: list[Process] = []
        self.server = os.fork()
        if self.server == 0:
            self.connection.close()
            serve(theirs)
        theirs.close()

    def start(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[int, int] | None = None,
    ) -> Process:
        """Starts `function(*arguments)`, which must be of a module. environment: variables beside those there are;
        limits: of resource.setrlimit, such as {resource.RLIMIT_FSIZE: 1000}."""
        folder = self.folder / str(len(self.started))
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        work = pickle.dumps((function, arguments))
        with suppress(BrokenPipeError):  # it has left a word
            self.connection.send((work, str(folder), os.getcwd(), dict(environment or {}), dict(limits or {})))
        while not isinstance(said := self.connection.recv(), int):
            if isinstance(said, str):
                raise RuntimeError(f"the server of processes has ended: {said}")
            self.ended |= said
        self.started.append(Process(self, said, folder))
        return self.started[-1]

    def zellige(self, *words: object, **options: Any) -> Process:
        """Starts `zellige WORDS`. options: of `start`."""
        return self.start(run_zellige, *map(str, words), **options)

    def job(self, function: Callable[..., Any], *arguments: Any, count: int = 2, **options: Any) -> list[Process]:
        """Starts `function(*arguments)` as each of `count` processes of one job, with what torchrun tells them."""
        with socket.socket() as connection:
            connection.bind(("127.0.0.1", 0))
            port = str(connection.getsockname()[1])
        of_all = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **(options.pop("environment", None) or {}),
        }
        return [
            self.start(
                function, *arguments, environment={**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options
            )
            for rank in range(count)
        ]

    def together(self, function: Callable[..., Any], *arguments: Any, count: int = 2, **options: Any) -> list[str]:
        """As `job`, and waits: what each of them said. Fails the test unless all end with 0."""
        return [process.succeed(120) for process in self.job(function, *arguments, count=count, **options)]

    def hear(self, seconds: float) -> None:
        """Takes down which processes have ended; waits so long for one that does."""
        if self.connection.poll(seconds):
            self.ended |= self.connection.recv()

    def end_all(self) -> None:
        for process in self.started:
            if process.pid not in self.ended:
                process.kill()
                process.wait()

    def close(self) -> None:
        self.connection.close()
        os.waitpid(self.server, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


def serve(connection: Connection) -> None:
    """Forks a process for each request until the other end is closed."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.SIG_IGN)
        torch.set_num_threads(1)
        for module in PRELOADED:
            importlib.import_module(module)
        Image.init()
        gc.collect()
        gc.freeze()
        running: dict[int, Any] = {}
        while True:
            if connection.poll(0.005 if running else None):
                request = connection.recv()
                process = FORK.Process(target=begin, args=(connection, *request))
                process.start()
                running[process.pid] = process
                connection.send(process.pid)
            if ended := {pid: process.exitcode for pid, process in running.items() if process.exitcode is not None}:
                connection.send(ended)
                running = {pid: process for pid, process in running.items() if pid not in ended}
    except (EOFError, OSError):  # the test process has ended
        for process in running.values():
            process.kill()
    except BaseException:  # such as a module that cannot be imported
        connection.send(traceback.format_exc())
    finally:
        os._exit(0)


def begin(
    connection: Connection,
    work: bytes,
    folder: str,
    place: str,
    environment: Mapping[str, str],
    limits: Mapping[int, int],
) -> None:
    """In the new process: makes it one of its own, then does the work."""
    connection.close()
    os.setpgid(0, 0)  # a group of its own, as a terminal or a launcher gives
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
        setattr(sys, name, open(number, "w", buffering=1, encoding="utf-8", closefd=False))  # noqa: SIM115
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    os.chdir(place)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1", **environment})
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    function, arguments = pickle.loads(work)
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_zellige(*words: str) -> None:
    """What the program `zellige` does, beginning and end included."""
    sys.argv = ["/env/bin/zellige", *words]
    from zellige.__main__ import main

    code = main()
    if "LOCAL_RANK" in os.environ:
        from common.processes import leave

        leave(code)
    sys.exit(code)


# ---- ways to die ---------------------------------------------------------------------------------------------------


class FileEvents:
    """What a process does to files, counted: opened to be written or made, moved, removed, folders made. At a given one
    the process gets a signal, before it happens. There is no way back: it is for a process that a test has started."""

    def __init__(self, below: str, at: int | None, number: int) -> None:
        """below: the folder in which events count; number: of the signal."""
        self.below, self.at, self.number, self.count = os.path.realpath(below), at, number, 0
        sys.addaudithook(self.notice)

    def notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(self.below):
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)


def counted(below: str, record: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function(*arguments)`; how many things it does to files below a folder goes to the file `record`."""
    events = FileEvents(below, None, 0)
    try:
        function(*arguments)
    finally:
        Path(record).write_text(str(events.count), encoding="utf-8")


def signalled(below: str, event: int, number: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function(*arguments)`; the process gets a signal before the `event`-th thing it does to files below a
    folder: SIGKILL to die there, SIGSTOP to stand still until SIGCONT."""
    FileEvents(below, event, number)
    function(*arguments)


def instants(seed: object, total: int, count: int) -> Sequence[int]:
    """`count` of the numbers 1 to `total`, drawn by a seed, in rising order."""
    return sorted(random.Random(repr(seed)).sample(range(1, total + 1), min(count, total)))
