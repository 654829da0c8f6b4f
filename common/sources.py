"""What results were made of, file by file: a result counts as made only while its sources are what they were."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from common.errors import explain_disk_errors
from common.files import atomic_file, json_value, sha256_of_file

SOURCES_NAME = "sources.jsonl"
READERS = 8  # files that are read at a time where a result has several sources
AT_ONCE = 256  # files that are asked for together


class Mark(NamedTuple):
    """What tells whether files are what they were."""

    times: str  # SHA-256 over their sizes and times: cheap to compare, but a copy has other times
    contents: str  # SHA-256 over their bytes


class Sources:
    """The record of a folder of results, `sources.jsonl`: a line for each result, the last one counts.

    Any process of a job may add to it. A result without a line, of a build that had no record or of a process that was
    killed in between, counts as made of its sources if it is newer.
    """

    def __init__(self, out: Path):
        self.out = out
        self.marks = self.read()
        self.forgotten: str | None = None
        self.last: tuple[Sequence[Path], Mark] = ((), Mark("", ""))  # one file may be the source of many results
        self.given_up = False  # whoever adds in another thread stops soon, and adds nothing more

    def is_current(self, result: str, files: Sequence[Path]) -> bool:
        """Whether `result`, a file below the folder that is there, was made of `files` as they are now."""
        mark = self.marks.get(result)
        if mark is None:
            made = os.stat(self.out / result).st_mtime_ns
            newer = all(time_of(file) <= made for file in files)
            if newer and files:  # of none there is no record
                self.add(result, files)  # so that it is whole
            return newer
        if mark.times == times_of(files):
            return True
        if mark.contents != self.mark(files).contents:
            return False
        self.add(result, files)  # copied or touched, and the same
        return True

    def are_at(self, files: Mapping[str, Sequence[Path]]) -> bool:
        """Whether there is a record, and each result in it was made of the same bytes as `files` has for it: the
        sources have only moved."""
        return bool(self.marks) and all(
            result in files and self.is_current(result, files[result]) for result in list(self.marks)
        )

    def add(self, result: str, files: Sequence[Path], times: str | None = None) -> None:
        """Records what `result` was made of, once it is written. times: `times_of` the files before they were read;
        left out, as they are now."""
        mark = self.mark(files)
        if self.given_up:
            return
        if times not in (None, mark.times):  # changed while they were read, before or after: nothing equals that
            mark = Mark("", "")
        self.marks[result] = mark
        record = self.out / SOURCES_NAME
        with explain_disk_errors(record), open(record, "a", encoding="utf-8") as file:
            file.write(line(result, mark))

    def mark(self, files: Sequence[Path]) -> Mark:
        """Of the files as they are now."""
        times = times_of(files)
        if self.last != (files, Mark(times, self.last[1].contents)):
            contents = contents_of(files, lambda: self.given_up)
            self.last = (files, Mark(times_of(files), contents))  # one that changes meanwhile has another time later
        return self.last[1]

    def forget(self, beginning: str) -> None:
        """Results whose names begin so are gone: `finish` leaves no line of them."""
        self.forgotten = beginning

    def finish(self) -> None:
        """Leaves one line for each result, in order. For one process, when all have added theirs."""
        marks = {
            name: mark
            for name, mark in self.read().items()
            if self.forgotten is None or not name.startswith(self.forgotten)
        }
        if marks:
            with atomic_file(self.out / SOURCES_NAME) as temporary:
                temporary.write_text("".join(line(name, marks[name]) for name in sorted(marks)), encoding="utf-8")

    def read(self) -> dict[str, Mark]:
        marks = {}
        if (self.out / SOURCES_NAME).is_file():
            for text in (self.out / SOURCES_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                    value = json_value(text)
                    marks[str(value["result"])] = Mark(str(value["times"]), str(value["contents"]))
        return marks


@contextmanager
def added_beside(sources: Sources) -> Iterator[Callable[[str, Sequence[Path], str], None]]:
    """`Sources.add` in a thread, one result after another, since it reads all their sources once more. Who adds the
    next waits for the last; where this ends well, all is added. Raises what went wrong."""
    adding: Future[None] | None = None

    def add(result: str, files: Sequence[Path], times: str) -> None:
        nonlocal adding
        if adding is not None:
            adding.result()
        adding = pool.submit(sources.add, result, files, times)

    with ThreadPoolExecutor(1, "sources") as pool:
        try:
            yield add
        except BaseException:
            sources.given_up = True
            raise
        if adding is not None:
            adding.result()


def line(result: str, mark: Mark) -> str:
    return json.dumps({"result": result, **mark._asdict()}) + "\n"


def times_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            digest.update(b"none")
        else:
            digest.update(f"{status.st_size} {status.st_mtime_ns};".encode())
    return digest.hexdigest()[:32]


def contents_of(files: Sequence[Path], given_up: Callable[[], bool] = lambda: False) -> str:
    """given_up: whether nobody wants to know it any more."""
    if len(files) == 1:
        return content_of(files[0])
    found: list[str] = []
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), AT_ONCE):
            if given_up():
                break
            found += pool.map(content_of, files[start : start + AT_ONCE])
    return hashlib.sha256(";".join(found).encode()).hexdigest()[:32]


def content_of(file: Path) -> str:
    try:
        return sha256_of_file(file)[:32]
    except OSError:
        return "none"


def time_of(file: Path) -> int:
    """When a file changed, in nanoseconds; 0 where there is none."""
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0
