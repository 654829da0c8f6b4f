"""Progress bars: what they count, and that only a person at a terminal sees them."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress

import pytest

from common.progress import progress_bar, with_progress


def test_a_pipe_gets_no_bar(capsys):
    assert list(with_progress([1, 2], "images")) == [1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def everything(leader: int) -> str:
    """What a terminal was sent: some systems hand it over a write at a time."""
    seen = b""
    with suppress(OSError):  # Linux says so that the other end is closed
        while part := os.read(leader, 100_000):
            seen += part
    return seen.decode()


def test_a_terminal_gets_one_that_counts_units_and_another_process_none(monkeypatch):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        list(with_progress([range(0, 4), range(4, 6)], "images", size=len))
    seen = everything(leader)
    assert "6/6" in seen
    assert re.search(r"[\d.?]+ ?(images/s|s/ images)", seen)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(3, "images", shown=False) as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""
    os.close(leader)


@pytest.mark.parametrize(("variable", "shown"), [("1", False), ("true", False), ("0", True), ("", True), (None, True)])
def test_the_environment_turns_bars_off(monkeypatch, variable: str | None, shown: bool):
    pty = pytest.importorskip("pty")
    if variable is None:
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
    else:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar(3, "images") as bar:
            assert bar.disable is not shown
    os.close(leader)
