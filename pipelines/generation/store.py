"""Where results are written: a folder, or whatever fsspec reaches by an address, such as a bucket.

A file is there whole or not at all: in a folder it is written beside its place and moved there, and objects of a bucket
appear when they are complete.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

from common.errors import UserError, explain_disk_errors
from common.files import atomic_file, temporary_path, written_here

ONE_SLASH = re.compile(r"[a-z][a-z0-9+]+:/(?!/)")  # of two letters at least: one is a drive of Windows
PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs")}


class Store(Protocol):
    """Files by names such as `001000/001000.png`."""

    title: str  # what the user named

    def path(self, name: str) -> str:
        """As a person finds the file."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Without waiting for the disk: a power cut may damage the last files."""
        ...

    def write_many(self, files: Mapping[str, bytes]) -> None: ...

    def writing(self, name: str) -> Any:
        """A context with the path of a temporary file, which becomes this one where the context ends well, and is
        on the disk then."""
        ...

    def open(self, name: str) -> IO[bytes]: ...

    def sizes(self, folder: str, names: Sequence[str]) -> list[int]:
        """Bytes of files of one folder, "" for the outermost; -1 for those that are not there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the files in it, without the folder; none where there is no such folder."""
        ...

    def read(self, names: Sequence[str]) -> list[bytes]:
        """The files, which are there."""
        ...

    def remove(self, name: str) -> None:
        """Whether it is there or not."""
        ...


def is_address(out: str) -> bool:
    """Whether it is fsspec's to reach, such as s3://bucket/place."""
    return "://" in out and not out.startswith("file://")


def open_store(out: str) -> Store:
    """Raises UserError for an address that nothing here can reach."""
    if ONE_SLASH.match(out):
        raise UserError(
            f"{out}, expected a folder, or an address with two slashes, such as s3://bucket/place (a pathlib.Path "
            "loses one of them: give it as text)"
        )
    return ObjectStore(out) if is_address(out) else FolderStore(folder_of(out))


def folder_of(out: str) -> Path:
    return Path(out.removeprefix("file://")).expanduser()


class FolderStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.title = str(folder)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        temporary = temporary_path(path)
        written_here.add(temporary)
        try:
            try:
                write_bytes(temporary, data)
            except FileNotFoundError:
                with explain_disk_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(temporary, data)
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C comes here as well
            with explain_disk_errors(path):
                with suppress(OSError):  # must not hide what went wrong before
                    temporary.unlink(missing_ok=True)
                raise
        finally:
            written_here.discard(temporary)

    def write_many(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            self.write(name, data)

    def writing(self, name: str) -> Any:
        return atomic_file(self.folder / name)

    def open(self, name: str) -> IO[bytes]:
        return open(self.folder / name, "rb")

    def sizes(self, folder: str, names: Sequence[str]) -> list[int]:
        root = os.path.join(self.folder, folder)
        return [size_of(f"{root}/{name}" if folder else f"{root}{name}") for name in names]

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, names: Sequence[str]) -> list[bytes]:
        return [(self.folder / name).read_bytes() for name in names]

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:  # a nearly full disk takes a part
            left = left[file.write(left) :]


def size_of(path: str) -> int:
    try:
        found = os.stat(path)
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


class ObjectStore:
    def __init__(self, address: str) -> None:
        import fsspec  # takes a while, and only those who name an address need it

        protocol = address.partition("://")[0]
        package, extra = PACKAGES.get(protocol, ("", ""))
        if package and find_spec(package) is None:
            raise UserError(
                f"{address} needs the package {package}, which is not installed; pip install 'zellige[{extra}]'"
            )
        self.title = address
        with explained(address):
            try:
                self.fs, self.root = fsspec.core.url_to_fs(address)
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"{address} cannot be reached ({str(error).splitlines()[0]}); name a folder, or an address that "
                    "fsspec knows, such as s3://bucket/place"
                ) from error
        self.root = self.root.rstrip("/")

    def path(self, name: str) -> str:
        return f"{self.title.rstrip('/')}/{name}"

    def place(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def write(self, name: str, data: bytes) -> None:
        self.write_many({name: data})

    def write_many(self, files: Mapping[str, bytes]) -> None:
        with explained(self.title):
            self.fs.pipe({self.place(name): data for name, data in files.items()})

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="zellige-") as folder:
            temporary = Path(folder) / "file"
            yield temporary
            with explained(self.title):
                self.fs.put_file(str(temporary), self.place(name))

    def open(self, name: str) -> IO[bytes]:
        with explained(self.title):
            return self.fs.open(self.place(name), "rb")

    def sizes(self, folder: str, names: Sequence[str]) -> list[int]:
        found = dict(self.listed(folder))
        return [found.get(name, -1) for name in names]

    def names(self, folder: str) -> list[str]:
        return [name for name, _ in self.listed(folder)]

    def listed(self, folder: str) -> Iterator[tuple[str, int]]:
        with explained(self.title):
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self.place(folder), detail=True)
            except FileNotFoundError:
                return
        for entry in entries:
            if entry["type"] == "file":
                yield entry["name"].rpartition("/")[2], entry["size"]

    def read(self, names: Sequence[str]) -> list[bytes]:
        with explained(self.title):
            found = self.fs.cat([self.place(name) for name in names]) if names else {}
            return [found[self.place(name)] for name in names]

    def remove(self, name: str) -> None:
        with explained(self.title), suppress(FileNotFoundError, KeyError):
            self.fs.rm_file(self.place(name))


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Whatever the many libraries behind fsspec raise, as one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{address} cannot be written or read ({type(error).__name__}: {reason}); check the address, that the "
            "bucket exists, and the credentials in the environment; the same command continues"
        ) from error
