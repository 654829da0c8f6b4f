"""What every test gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.processes import Processes

SERVER = pytest.StashKey[Processes]()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test that draws random numbers draws the same ones each time, alone or among others."""
    torch.manual_seed(0)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Now all is imported, and no test has started a thread yet."""
    if any("process_server" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[SERVER] = Processes()


@pytest.fixture(scope="session")
def process_server(pytestconfig: pytest.Config) -> Iterator[Processes]:
    server = pytestconfig.stash[SERVER]
    yield server
    server.close()


@pytest.fixture
def processes(process_server: Processes) -> Iterator[Processes]:
    """Starts real processes, cheaply (tests/processes.py). Those that still run when the test ends are killed."""
    yield process_server
    process_server.end_all()
