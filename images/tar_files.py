"""Which tars a path names, by patterns and URLs, and the bytes of one wherever it lies."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from common.errors import UserError
from common.wording import counted, one_line

PATTERN = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
MOST_TARS = 1_000_000  # that braces may stand for


class Tar(NamedTuple):
    place: str  # path or URL
    name: str  # relative to the folder that all tars of a source lie in
    size: int  # bytes
    mark: str  # another one when the tar has changed


def is_url(place: str) -> bool:
    return "://" in place


def is_tars(path: str) -> bool:
    """Whether a path names tars: one, a pattern, or a URL."""
    return (is_url(path) or bool(re.search(r"\.(tar(\.\w+)?|tgz)$", path))) and not Path(path).expanduser().is_dir()


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{08..10}b` and `a{x,y}b`, as shells and webdataset have them."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is None:
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if len(numbers) > MOST_TARS:
            raise UserError(f"{pattern} stands for {len(numbers):,} tars, expected at most {MOST_TARS:,}; check it")
        parts: Any = (str(number).zfill(min(len(first), len(last))) for number in numbers)
    else:
        parts = words.split(",")
    for part in parts:
        yield from expand_braces(pattern[: match.start()] + part + pattern[match.end() :])


def find_tars(path: str) -> list[Tar]:
    """What a path stands for: a folder of tars, one, or a pattern of paths or URLs. Raises UserError."""
    places: list[str] = []
    for one in expand_braces(path):
        if is_url(one):
            if ".tar" not in one.rpartition("/")[2]:  # a folder
                one = f"{one.rstrip('/')}/*.tar"
            places += glob_url(one) if PATTERN.search(one) else [one]
        elif Path(one).expanduser().is_dir():
            places += sorted(str(file) for file in Path(one).expanduser().rglob("*.tar") if file.name[0] != ".")
        elif Path(one).expanduser().exists() or not PATTERN.search(one):
            places.append(str(Path(one).expanduser()))
        else:
            places += sorted(glob.glob(str(Path(one).expanduser())))
    places = [place if "/" in place else f"./{place}" for place in places]
    if not places:
        raise UserError(f"data.path={path} fits no tars; check the path, and the pattern if it is one")
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise UserError(f"data.path={path} names {twice[0]} twice; name each tar once")
    found = [(place, *looked_up(place)) for place in places]
    if missing := [place for place, size, _ in found if size is None]:
        raise UserError(
            f"{counted(len(missing), 'tar')} of the {len(places)} of data.path={path} are not there, the first is "
            f"{missing[0]}: check the pattern, or bring what is missing"
        )
    cut = len(shared_folder(places)) + 1
    return [Tar(place, place[cut:], size or 0, mark) for place, size, mark in found]


def shared_folder(places: Sequence[str]) -> str:
    """The innermost folder in which all of these lie; empty for the root."""
    shared, *others = ([*place.split("/")[:-1]] for place in places)
    for other in others:
        shared = [part for part, _ in itertools.takewhile(equal, zip(shared, other, strict=False))]
    return "/".join(shared)


def equal(pair: tuple[str, str]) -> bool:
    return pair[0] == pair[1]


def looked_up(place: str) -> tuple[int | None, str]:
    """Bytes of a tar, None where it is not there, and what changes when it does. Raises UserError."""
    if not is_url(place):
        try:
            status = os.stat(place)
        except OSError:
            return None, ""
        return status.st_size, f"{status.st_size} {status.st_mtime_ns}"
    system, path = system_of(place)
    try:
        return int(system.info(path)["size"]), str(system.ukey(path))
    except FileNotFoundError:
        return None, ""
    except Exception as error:  # each service has errors of its own
        raise UserError(f"{place} cannot be looked up ({one_line(error)}); check it, and the access") from error


def glob_url(pattern: str) -> list[str]:
    system, path = system_of(pattern)
    try:
        return sorted(str(system.unstrip_protocol(found)) for found in system.glob(path))
    except Exception as error:  # each service has errors of its own
        raise UserError(f"{pattern} cannot be listed ({one_line(error)}); check it, and the access") from error


def system_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. It keeps one for each process. Raises UserError."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a service of a package that is not there, or that nobody knows
        raise UserError(f"{url} cannot be opened by fsspec: {error}") from error


def read_span(tar: Tar, start: int, size: int) -> bytes:
    """`size` bytes of a tar. Raises UserError where it is gone, or cut since it was indexed."""
    try:
        if is_url(tar.place):
            system, path = system_of(tar.place)
            content = bytes(system.cat_file(path, start=start, end=start + size)) if size else b""
        else:
            file = os.open(tar.place, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                content = os.pread(file, size, start)
            finally:
                os.close(file)
    except FileNotFoundError as error:
        raise UserError(
            f"{tar.place} is gone, which was there when this command began: bring it back, and give the same command "
            "again, which continues"
        ) from error
    except Exception as error:  # OSError, and what each service has
        raise UserError(
            f"{tar.place} cannot be read at byte {start} ({one_line(error)}); give the same command again "
            "when it can, which continues"
        ) from error
    if len(content) < size:
        raise UserError(
            f"{tar.place} ends within what had {size} bytes from byte {start} on when it was indexed: it was cut or "
            "written anew since; bring it back, and give the same command again, which continues"
        )
    return content
