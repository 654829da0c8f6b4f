"""What takes long and can be made anew is kept among the user's caches, so that a second start is quick.

A cache costs time at worst: what is damaged counts as missing, and one that cannot be written is left unwritten.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_file

KEY = "key"  # what the arrays are of: a name alone could be another's with the same hash


def cache_folder(kind: str) -> Path:
    """`~/.cache/zellige/KIND`, or where XDG_CACHE_HOME has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zellige" / kind


def place_of(kind: str, key: str) -> Path:
    return cache_folder(kind) / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"


def find_arrays(kind: str, key: str) -> dict[str, np.ndarray] | None:
    """What `keep_arrays` kept under this key; None where there is nothing, or something damaged."""
    with suppress(OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
        with np.load(place_of(kind, key), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if bytes(arrays.pop(KEY)) == key.encode("utf-8", "surrogateescape"):
            return arrays
    return None


def keep_arrays(kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays of numbers or bytes, whole or not at all."""
    said = np.frombuffer(key.encode("utf-8", "surrogateescape"), dtype=np.uint8)
    with (
        suppress(OSError, UserError, RuntimeError),  # a full disk, or a home that cannot be written
        atomic_file(place_of(kind, key)) as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez(file, **{KEY: said}, **arrays)  # type: ignore[arg-type]  # which takes an option for an array
