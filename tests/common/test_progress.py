"""Progress bars: what they count, and that only a person at a terminal sees them."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from common.progress import progress_bar, with_progress


def test_a_pipe_gets_no_bar(capsys):
    assert list(with_progress([1, 2], "images")) == [1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_terminal_gets_one_that_counts_units_and_another_process_none(monkeypatch):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        list(with_progress([range(0, 4), range(4, 6)], "images", size=len))
    seen = os.read(leader, 100_000).decode()
    assert "6/6" in seen
    assert re.search(r"[\d.?]+ ?(images/s|s/ images)", seen)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(3, "images", shown=False) as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""
    os.close(leader)
