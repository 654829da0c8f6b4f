"""A `.zlg` file that is open: reading parts of it, its checksum, and what is said of a damaged one."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

from common.errors import UserError
from pipelines.codec.fields import CHECKSUM_BYTES

SUFFIX = ".zlg"
MAGIC = b"\x89ZLG"
FIRST_READ = 4096  # bytes: the heads of most files
CHUNK = 1 << 20  # bytes of a file in memory while its checksum is computed
SHORTEST = 10  # bytes


class SealedFile:
    """A file that ends with a checksum of all before it. bytes_read: so far. Its methods raise UserError for what is
    damaged."""

    def __init__(self, file: BinaryIO | io.RawIOBase, title: str):
        self.file, self.title = file, title
        self.length = file.seek(0, os.SEEK_END)
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read_beginning(self) -> bytes:
        """As much as the heads of most files take. Raises UserError for another kind of file."""
        beginning = self.read(0, min(FIRST_READ, self.length))
        if beginning[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{self.title} is no .zlg file: it does not begin as one; name a file that `zellige compress` wrote"
            )
        if self.length < SHORTEST:
            raise self.damaged(f"it ends after {self.length} bytes")
        return beginning

    def check(self) -> None:
        """Holds the whole file against its checksum."""
        crc, end = 0, self.length - CHECKSUM_BYTES
        for start in range(0, end, CHUNK):
            crc = zlib.crc32(self.read(start, min(CHUNK, end - start)), crc)
        if crc != int.from_bytes(self.read(end, CHECKSUM_BYTES), "little"):
            raise self.damaged("its checksum is wrong")

    def read(self, start: int, count: int) -> bytes:
        self.file.seek(start)
        parts: list[bytes] = []
        while count > 0:  # an unbuffered file may give less than is there
            part = self.file.read(count)
            if not part:
                raise self.damaged("it ends early")
            parts.append(part)
            count -= len(part)
            self.bytes_read += len(part)
        return b"".join(parts)

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.title} is damaged or cut short: {what}; copy it again from where it came")

    def edited(self, what: object) -> UserError:
        return UserError(f"{self.title} was edited or is from another program: {what}; compress the image anew")


Opened = TypeVar("Opened", bound=SealedFile)


def opened(
    kind: Callable[[BinaryIO | io.RawIOBase, str], Opened], source: Path | str | bytes, title: str | None
) -> Opened:
    """A file, or its bytes, as one of this kind. title: how messages name it; None: its path. Raises UserError where
    there is no such file."""
    if isinstance(source, bytes):
        return kind(io.BytesIO(source), title or "the file")
    try:
        file = Path(source).open("rb", buffering=0)  # noqa: SIM115 (closed by what is returned)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{source} is no file; name a {SUFFIX} file") from error
    try:
        return kind(file, title or str(source))
    except BaseException:
        file.close()
        raise


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises UserError where there is none."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path} is no file; name a {SUFFIX} file") from error
