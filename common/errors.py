"""The one exception for what a user can get wrong, and how the operating system's own errors become it."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

# Windows knows no quota.
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class UserError(ValueError):
    """One sentence: what was given, what was expected, how to fix it. The command line exits with 2 on it."""


class Stopped(Exception):  # noqa: N818 - none is made by anybody
    """The work was asked to stop, has saved what it did, and the same command continues it; says so in one line. The
    command line exits with STOPPED_CODE on it."""


STOPPED_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth another try


class FieldError(UserError):
    """A field of a config cannot have its value. A config does not know what it is part of: those who know put the path
    before the field by `at`."""

    def __init__(self, config: object, field: str, expected: str, path: str = "") -> None:
        """field: of `config`, or of a config inside it, such as `layer.dim`; path: of `config`, as far as known."""
        place = f"{path}.{field}" if path else field
        super().__init__(f"{place}={attrgetter(field)(config)}, expected {expected}")
        self.config, self.field, self.expected, self.path = config, field, expected, path

    def at(self, path: str) -> FieldError:
        """The same error in a config that stands at `path`, such as `model.quantizer`."""
        return FieldError(self.config, self.field, self.expected, f"{path}.{self.path}" if self.path else path)

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        return UserError, (str(self),)


@contextmanager
def fields_at(path: str) -> Iterator[None]:
    """Errors on fields of a config that is built here name them by `path`."""
    try:
        yield
    except FieldError as error:
        raise error.at(path) from error


def check_fields(config: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raises FieldError for the first rule that does not hold: a field's name, whether its value is valid, and what
    was expected."""
    for name, valid, expected in rules:
        if not valid:
            raise FieldError(config, name, expected)


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a used up quota, a file that is too large or a missing permission while writing `path` into a
    UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(
                f"the disk is full: {path} was not written, and what stood there before is untouched; "
                "free some space and run the same command again, it continues where it stopped"
            ) from error
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{path} was not written: it is larger than a file may be here, by the file system or by a limit of "
                "this process (ulimit -f); raise the limit, or name another disk, and run the same command again, it "
                "continues where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write {path}; choose another folder or change its owner") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(
                f"{path} cannot be written: a file stands where a folder should be, or the reverse"
            ) from error
        raise
