"""What several tests of stage two share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stage2_prior.pair import write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))
