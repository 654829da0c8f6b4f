"""Zip files of others, .npz files of arrays among them: what they claim is held against the file before it is read."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.npyio import NpzFile

from common.errors import UserError
from common.files import foreign_content
from common.wording import one_line

LIMIT = "ZELLIGE_MAX_UNPACKED_GB"  # variable of the environment
FREE = 1.0  # gigabytes that a file may unpack to, however small it is
RATIO = 100  # beyond them, the size of its content by its own: images that compress so well are of one colour


@contextmanager
def opened_npz(path: Path) -> Iterator[NpzFile]:
    """The arrays of a file, read when they are asked for; none of Python objects, which may run code. Raises UserError,
    also for what cannot be read inside."""
    try:
        with open(path, "rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                raise UserError(f"{path} is a single array, expected an .npz file of named ones")
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError, KeyError, MemoryError) as error:
        if "Object arrays" in str(error):  # lists of unequal lengths, or texts in an array of objects
            raise UserError(
                f"{path} holds arrays of Python objects, which are not read because they may run code: make images one "
                "uint8 array, all of one size, and class_names of texts, np.array(names, dtype=str)"
            ) from error
        reason = one_line(error, 200) or type(error).__name__
        why = foreign_content(path) or f"cannot be read as .npz ({reason}): it is damaged, fetch or make it anew"
        raise UserError(f"{path} {why}") from error


def check_if_packed(path: Path) -> None:
    """`check_unpacked` of a file that may be a zip file, as those of torch.save are; whether it is a sound one, who
    reads it says."""
    if zipfile.is_zipfile(path):
        try:
            check_unpacked(path)
        except UserError:
            raise
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            return


def check_unpacked(path: Path) -> None:
    """Raises UserError for a zip file that unpacks to far more than it takes, or whose arrays claim another size than
    their files have; zipfile.BadZipFile or ValueError for one that is damaged. Nothing but heads is read."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked, most = sum(member.file_size for member in members), most_unpacked(path.stat().st_size)
        if unpacked > most:
            raise UserError(
                f"{path} unpacks to {unpacked / 1e9:,.1f} GB, more than {most / 1e9:,.1f} GB, as files do that fill "
                f"the memory; if you trust it, set {LIMIT}={math.ceil(unpacked / 1e9)} in the environment"
            )
        for member in members:
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    claimed = bytes_claimed(file)
                if claimed != member.file_size:
                    raise ValueError(f"{member.filename} claims {claimed} bytes and has {member.file_size}")


def most_unpacked(size: int) -> float:
    """Bytes that a file of `size` bytes may unpack to."""
    try:
        allowed = float(os.environ.get(LIMIT) or FREE)
    except ValueError as error:
        raise UserError(f"{LIMIT}={os.environ[LIMIT]} in the environment, expected gigabytes, such as 20") from error
    return max(allowed * 1e9, RATIO * size)


def bytes_claimed(file: IO[bytes]) -> int:
    """Of a .npy file, its head and what that says of the data. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:  # version 3 differs by the letters that names of fields may have
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    return file.tell() + math.prod(shape) * dtype.itemsize
