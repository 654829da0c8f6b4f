"""JSON that says what it should be: a byte that flips on a disk or on the way is noticed, whichever it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError

SEAL = "sha256"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the checksum of all that is in it."""
    return {**value, SEAL: seal_of(value)}


def check_seal(path: Path, value: Mapping[str, Any], remedy: str) -> None:
    """Raises UserError, which ends in `remedy`, unless `value` of the file `path` is what was written; files of earlier
    versions do not tell."""
    if SEAL in value and value[SEAL] != seal_of(value):
        raise UserError(
            f"{path} is damaged: it is not what was written; {remedy}, or, if you edited it yourself, delete {SEAL} "
            "from it"
        )


def seal_of(value: Mapping[str, Any]) -> str:
    said = {name: part for name, part in value.items() if name != SEAL}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
