"""The public page: its names, its version, its types."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import zellige


def test_every_name_is_there_and_documented():
    for name in zellige.__all__:
        assert getattr(zellige, name) is not None
    assert zellige.__version__ == version("zellige")
    assert set(zellige.__all__) <= set(dir(zellige))


def test_another_name_is_refused_with_those_that_are_there():
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'; it has TwoStagePipeline"):
        _ = zellige.Pipeline


def test_the_import_alone_needs_no_torch():
    code = "import sys, zellige; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_type_checkers_see_the_types_of_all_packages():
    root = Path(zellige.__file__).parent.parent
    packages = [path.parent for path in root.glob("*/__init__.py") if path.parent.name not in ("tests", "benchmarks")]
    assert all((package / "py.typed").exists() for package in packages)
