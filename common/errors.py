"""The one exception for what a user can get wrong, and how the operating system's own errors become it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Windows knows no quota.
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class UserError(ValueError):
    """One sentence: what was given, what was expected, how to fix it. The command line exits with 2 on it."""


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a used up quota or a missing permission while writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(
                f"the disk is full: {path} was not written, and what stood there before is untouched; "
                "free some space and run the same command again, it continues where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write {path}; choose another folder or change its owner") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(
                f"{path} cannot be written: a file stands where a folder should be, or the reverse"
            ) from error
        raise
