"""Files that are either complete or absent: atomic writes, checksums, JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from common.errors import UserError, explain_disk_errors
from common.machine import is_alive, process_space

LEFTOVER = re.compile(r"\.(?P<name>.+?)(\.(?P<space>[0-9a-f]{8}))?\.(?P<pid>\d+)\.(?P<ending>tmp|old)")
FORGOTTEN = 24 * 3600.0  # seconds after which what a process elsewhere has not touched is no longer being written

written_here: set[Path] = set()  # by this process, at the moment


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well it takes the place of `path`, else it
    is removed.

    The data is flushed to disk before the rename, so after a crash `path` is the old file or the new one, whole.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with explain_disk_errors(path), written(temporary):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush_names(path.parent)
        finally:
            with suppress(OSError):  # must not hide what went wrong before
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_file`, for a folder: readers see the old folder or the new one, never a mixture.

    A folder cannot take the place of another in one move, so a process that dies between the two moves leaves
    the old one under a temporary name: `remove_leftovers` puts it back. Where `path` is a link, what it points to is
    replaced.
    """
    path = Path(path).resolve()
    temporary, replaced = temporary_path(path), temporary_path(path, "old")
    with explain_disk_errors(path), written(temporary, replaced):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    flush(file)
            if path.exists():
                os.replace(path, replaced)
            os.replace(temporary, path)
            flush_names(path.parent)
        finally:
            if replaced.exists() and not path.exists():  # an error, or Ctrl-C, came between the two moves
                with suppress(OSError):  # must not hide what went wrong before
                    os.replace(replaced, path)
            shutil.rmtree(temporary, ignore_errors=True)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)


def temporary_path(path: Path, ending: str = "tmp") -> Path:
    """Where this process writes what is to become `path`: beside it, under a name that says whose it is."""
    return path.with_name(f".{path.name}.{process_space()}.{os.getpid()}.{ending}")


@contextmanager
def written(*temporary: Path) -> Iterator[None]:
    """Inside, these are no leftovers of a former process that had this one's number."""
    written_here.update(temporary)
    try:
        yield
    finally:
        written_here.difference_update(temporary)


def is_left_over(temporary: Path, match: re.Match[str]) -> bool:
    """Whether nobody writes it any more: its process is dead, or one elsewhere, which cannot be asked, has not touched
    it for a day. Builds whose names did not say where kept a folder to themselves, and the folder is ours now."""
    if match["space"] is None:
        return True
    if match["space"] == process_space() and os.name == "posix":
        pid = int(match["pid"])
        return temporary not in written_here if pid == os.getpid() else not is_alive(pid)
    try:
        return time.time() - temporary.lstat().st_mtime > FORGOTTEN
    except FileNotFoundError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Clears `folder` of what atomic writes left there when their process was killed. What other processes are writing
    at the moment stays."""
    for leftover in sorted(Path(folder).glob(".*")):
        match = LEFTOVER.fullmatch(leftover.name)
        if match is None or not is_left_over(leftover, match):
            continue
        original = leftover.with_name(match["name"])
        if match["ending"] == "old" and not original.exists():
            os.replace(leftover, original)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def remove_leftovers_below(folder: Path) -> None:
    """As `remove_leftovers`, in `folder` and all folders in it, hidden ones too."""
    for place, folders, files in os.walk(folder):
        if any(name.startswith(".") and name.endswith(".tmp") for name in (*folders, *files)):
            remove_leftovers(Path(place))


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_replaceable(folder: Path, marker: str) -> None:
    """Raises UserError unless `folder` is absent, empty, or one that Zellige wrote, as its JSON file `marker` says:
    other libraries have files of that name too."""
    if not folder.exists():
        return
    if folder.is_dir():
        if not any(folder.iterdir()):
            return
        with suppress(UserError):
            if {"kind", "zellige_version"} <= read_json(folder / marker).keys():
                return
    raise UserError(f"{folder} exists and is something else than a model folder, so it is left alone; name another one")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises UserError when it is missing, damaged or something else."""
    try:
        value = json_value(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it is damaged or was edited: make it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; it is damaged or was edited: make it anew")
    return value


def json_value(text: str | bytes) -> Any:
    """The value of a JSON text that may be anybody's. Raises ValueError for what is none, is no UTF-8, or is nested too
    deeply for Python, which raises RecursionError by itself."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", "", 0) from error


def foreign_content(file: Path | str | BytesIO) -> str | None:
    """What stands in a file, or in the bytes of one, in place of its content, and what to do, as the end of a sentence
    that begins with the file's name; None if it is neither of the two that are frequent."""
    if isinstance(file, BytesIO):
        beginning = file.getvalue()[:256]
    else:
        with open(file, "rb") as stream:
            beginning = stream.read(256)
    beginning = beginning.lstrip().lower()
    if beginning.startswith(b"version https://git-lfs.github.com/"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned, or download the file"
    if beginning.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not the file itself: open it in a browser to see what the server says, and download anew"
    return None


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(file: Path) -> None:
    """Waits until a file's data is on the disk."""
    with open(file, "rb+") as handle:  # Windows flushes only what is open for writing
        os.fsync(handle.fileno())


def flush_names(folder: Path) -> None:
    """Waits until a folder's entries, the renames in it among them, are on the disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
