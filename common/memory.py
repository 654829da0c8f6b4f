"""Memory that a process has freed stays with it, instead of going back to the system and being fetched again."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
KEPT = 1 << 30  # bytes of free memory that are kept, and the largest block that counts as such


def keep_freed_memory() -> None:
    """On Linux, glibc gives the memory of every large tensor back to the kernel when it is freed, and the next one has
    to be mapped page by page: up to a quarter of the time on a CPU (docs/benchmarks.md). A whole process decides this,
    so commands call it and the library does not. Elsewhere it does nothing."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT)
        mallopt(TRIM_THRESHOLD, KEPT)
