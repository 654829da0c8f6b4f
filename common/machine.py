"""Which machine this is, which processes live on it, what locks and temporary files are signed with, and its cores."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from pathlib import Path


def machine() -> str:
    """What sets this machine apart from those that share its disks, until it is started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


@cache
def process_space() -> str:
    """Eight letters for where numbers of processes mean what they mean here: two containers of one machine have each a
    process 1."""
    try:
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        space = ""
    return hashlib.sha256(f"{machine()} {space}".encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process of this machine lives. True where that cannot be told, as on Windows."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another person's
        pass
    return True


def cores() -> int:
    """That this process may run on, shared out among those of its job on this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
