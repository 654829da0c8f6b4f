"""A folder that one process writes to at a time, also on a file system that several machines share.

The kernel keeps a lock on the file `.zellige.lock` and gives it up when the process ends, by kill -9 too. Where locks
do not reach, as on some network file systems, the file's time tells: its holder touches it every few seconds.

Several processes may each hold a part of a folder's work, a range of numbers, in a lock file of its own: whoever wants
all of it, or a part that overlaps, is refused.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from common.errors import UserError, explain_disk_errors
from common.files import json_value
from common.machine import machine

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".zellige.lock"
PART_NAME = re.compile(rf"{re.escape(LOCK_NAME)}\.(\d+)-(\d+)\.(\d+)")  # first, end and the process in its job
BEAT = 5.0  # seconds between two signs of life
PATIENCE = 20.0  # seconds without one after which a process that cannot be asked is taken for dead
SETTLED = 1.0  # seconds in which two that came at once, where there are no locks, see each other's name
OPENING = " (opening)"  # says the lock of who keeps a folder for a moment only
AT_THE_GATE = 120.0  # seconds for which one waits for others that open the same folder

held_here: dict[Path, str] = {}  # lock files and for which command; a lock does not keep a process from itself


@contextmanager
def held(folder: Path, command: str) -> Iterator[None]:
    """Keeps `folder`, which is made where it is missing, for this process. What is left empty is removed again.

    Raises UserError that names the other process if one is writing there, to a part of it too.
    """
    with locked(Path(folder).resolve() / LOCK_NAME, command):
        check_parts_free(folder, command)
        yield


@contextmanager
def gate(folder: Path, command: str) -> Iterator[None]:
    """As `held`, for the moment in which a part is taken or given up: waits for others that do so too. Raises UserError
    where another process keeps the whole folder."""
    path = Path(folder).resolve() / LOCK_NAME
    begin = time.monotonic()
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(path, f"{command}{OPENING}"))
            except UserError:
                if not is_opening(path) or time.monotonic() - begin > AT_THE_GATE:
                    raise
                time.sleep(random.uniform(0.02, 0.1))
                continue
            yield
            return


@contextmanager
def held_part(folder: Path, command: str, part: range, process: int = 0) -> Iterator[None]:
    """Keeps the numbers `part` of a folder's work for this process, one of a job that shares them. To be entered inside
    `gate`, or, by the other processes of a job, while the first one keeps them. Raises UserError that names another
    process that keeps some of them."""
    if process == 0:
        check_parts_free(folder, command, part)
    name = f"{LOCK_NAME}.{part.start}-{part.stop}.{process}"
    with locked(Path(folder).resolve() / name, command):
        yield


def check_parts_free(folder: Path, command: str, part: range | None = None) -> None:
    """Raises UserError if a process that lives keeps a part of the folder, one that overlaps `part`. Lock files of dead
    ones go."""
    dead: list[dict[str, object]] = []
    for path, other in parts_of(folder):
        if part is None or max(part.start, other.start) < min(part.stop, other.stop):
            if path in held_here:
                raise UserError(f"this process is writing to {path.parent} already; wait for it to end")
            with explain_disk_errors(path):
                file, holder = take(path, command)
                release(path, file)
            dead += [] if holder is None else [holder]
    say_taken_over(Path(folder), dead)


def parts_of(folder: Path) -> list[tuple[Path, range]]:
    """The lock files of parts, of dead processes too, and what they keep."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(Path(folder).resolve() / name, match) for name in names if (match := PART_NAME.fullmatch(name))]
    return [(path, range(int(match[1]), int(match[2]))) for path, match in found]


def is_opening(path: Path) -> bool:
    """Whether who holds a folder's lock is only about to take or give up a part, or has just done so."""
    if path in held_here:  # opening it again would give up the lock
        return held_here[path].endswith(OPENING)
    try:
        said = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    return not said or OPENING in said


@contextmanager
def locked(path: Path, command: str) -> Iterator[None]:
    """Keeps one lock file, whose folder is made where it is missing and removed again where it is left empty."""
    folder = path.parent
    if path in held_here:
        raise UserError(f"this process is writing to {folder} already; wait for it to end, or name another folder")
    made = not folder.exists()
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file, dead = take(path, command)
    say_taken_over(folder, [] if dead is None else [dead])
    held_here[path] = command
    ended = threading.Event()
    pulse = threading.Thread(target=keep_fresh, args=(path, ended), daemon=True)
    pulse.start()
    try:
        yield
    finally:
        ended.set()
        pulse.join()
        held_here.pop(path, None)
        release(path, file)
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def take(path: Path, command: str) -> tuple[int, dict[str, object] | None]:
    """The open lock file, which is this process's now, and what a process wrote of itself that died with it; None where
    nothing is written, since one that has only just made the file may still live. Raises UserError, or OSError."""
    while True:
        try:
            file, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                file, is_new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:
                continue  # given up in this instant
        try:
            locked = lock(file)
            if not is_in_place(file, path):  # given up between the two calls: this is no longer the folder's lock
                os.close(file)
                continue
            holder = read_holder(file)
            gone = is_new or (locked and holder.get("machine") in (None, machine()))
            # Watching opens the file, and what a process opens and closes takes all its locks on that file with it.
            if locked is False or not (gone or (is_silent(path) and lock(file) is not False)):
                raise UserError(refusal(path, holder))
            dead = holder or None
            me = {
                "command": f"zellige {command}",
                "pid": os.getpid(),
                "host": platform.node(),
                "machine": machine(),
                "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
            }
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, json.dumps(me).encode())
            if not locked:
                time.sleep(SETTLED)
                if (holder := read_holder(file)) != me:
                    raise UserError(refusal(path, holder))
            return file, None if is_new else dead
        except BaseException:
            with suppress(OSError):
                os.close(file)
            raise


def release(path: Path, file: int) -> None:
    if fcntl is None:  # Windows deletes nothing that is open
        os.close(file)
    with suppress(OSError):
        if fcntl is None or is_in_place(file, path):  # else somebody deleted it, and another process may have its own
            path.unlink()  # before the lock is given up, or it would be another's
    if fcntl is not None:
        os.close(file)


def lock(file: int) -> bool | None:
    """Whether the kernel gave the lock; None where there are none."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks
        return None
    return True


def is_in_place(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def is_silent(path: Path) -> bool:
    """Watches the file for `PATIENCE` seconds: whether its holder gives no sign of life. Times of two machines cannot
    be compared, so what counts is whether the file's own time moves."""
    begin, first = time.monotonic(), time_of(path)
    while time.monotonic() - begin < PATIENCE:
        time.sleep(min(0.5, PATIENCE / 10))
        if time_of(path) != first:
            return False
    return True


def time_of(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:  # opening asks the server anew
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def keep_fresh(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def read_holder(file: int) -> dict[str, object]:
    """What the holder wrote of itself; empty if it died before it could."""
    with suppress(OSError, ValueError):
        os.lseek(file, 0, os.SEEK_SET)
        value = json_value(os.read(file, 4096))
        if isinstance(value, dict):
            return value
    return {}


def refusal(path: Path, holder: dict[str, object]) -> str:
    elsewhere = holder.get("machine") not in (None, machine())
    return (
        f"another process is writing to {path.parent}{described(holder)}; wait for it to end, or name "
        "another folder" + (f" (if that machine is down, delete {path})" if elsewhere else "")
    )


def described(holder: dict[str, object]) -> str:
    """In brackets, as far as it is known."""
    known = ", ".join(
        f"{before} {holder[name]}".strip()
        for name, before in (("command", ""), ("pid", "pid"), ("host", "on"), ("since", "since"))
        if name in holder
    )
    return f" ({known})" if known else ""


def say_taken_over(folder: Path, dead: Sequence[dict[str, object]]) -> None:
    """A word where somebody else may still wonder what became of a process."""
    if dead:
        others = f", and {len(dead) - 1} more" if len(dead) > 1 else ""
        print(
            f"note: the process that was writing to {folder} has ended without a word{described(dead[0])}{others}; it "
            "is continued",
            file=sys.stderr,
            flush=True,
        )
