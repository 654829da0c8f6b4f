"""The server of processes for tests says why it has none."""

from __future__ import annotations

import pytest

from tests import processes


def test_a_server_that_cannot_import_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "PRELOADED", ("no_such_module",))
    server = processes.Processes()
    try:
        with pytest.raises(RuntimeError, match=r"the server of processes has ended: (.|\n)*'no_such_module'"):
            server.start(print)
    finally:
        server.close()
