"""Names that stand in a file: what is written or read by them lies in the folder that is meant, and nowhere else."""

from __future__ import annotations

import os

LONGEST_NAME = 240  # bytes of a file or folder
WINDOWS = os.name == "nt"
# Windows takes these for devices, whatever ending they have.
PORTS = {f"{port}{number}" for port in ("com", "lpt") for number in "123456789¹²³"}
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$", *PORTS}


def is_below(name: object) -> bool:
    """Whether a value is a path to a file below the folder that it is relative to. Elsewhere than on Windows a colon
    and a backslash are characters of names like others."""
    return isinstance(name, str) and all(map(is_part, (name.replace("\\", "/") if WINDOWS else name).split("/")))


def is_plain(name: object) -> bool:
    """Whether a value is the name of a file in a folder, and no path, on any system."""
    return isinstance(name, str) and not set(name) & set("/\\:") and is_part(name)


def is_part(part: str) -> bool:
    """Whether a file or folder can have this name on this system, and is in the folder that it is looked for in."""
    try:
        too_long = len(os.fsencode(part)) > LONGEST_NAME
    except UnicodeEncodeError:  # half a character, as JSON can have it
        return False
    if part in ("", ".", "..") or "\0" in part or too_long:
        return False
    if not WINDOWS:
        return True
    is_device = part.split(".")[0].strip(" ").lower() in DEVICES
    return not (is_device or ":" in part or part[-1] in ". ")  # Windows leaves dots and blanks at the end out
