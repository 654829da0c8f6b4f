"""No circle of files: whatever a file imports, at its top, inside a function or for types alone, does not lead back."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = SETTINGS["tool"]["importlinter"]["root_packages"]


def modules(root: Path, packages: list[str]) -> dict[str, Path]:
    """Every file of the packages by the name it is imported by; a package's own is its `__init__.py`."""
    files = (path for package in packages for path in (root / package).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(source: str) -> Iterator[str]:
    """The names that a source imports, those of what it takes from a module included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """The files that each file imports. A name that is no file is one of the file before its last dot. The packages
    around a file are not counted: Python runs them, but what a file needs of them it imports by name."""
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = imported(path.read_text(encoding="utf-8"))
        known = {each if each in files else each.rpartition(".")[0] for each in found}
        graph[name] = known & files.keys()
    return graph


def test_no_circle_of_files():
    graph = imports_of(modules(ROOT, PACKAGES))
    assert len(graph) > 100
    assert "stage2_prior.priors.base" in graph["stage2_prior.sampling"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files of a circle


def test_the_graph_knows_imports_in_functions_and_for_types_alone(tmp_path: Path):
    (tmp_path / "house").mkdir()
    for name, source in {
        "__init__": "",
        "door": "if TYPE_CHECKING:\n    from house.room import Chair\n",
        "room": "def build():\n    from house import door\n",
    }.items():
        (tmp_path / "house" / f"{name}.py").write_text(source)
    graph = imports_of(modules(tmp_path, ["house"]))
    assert graph == {"house": set(), "house.door": {"house.room"}, "house.room": {"house.door"}}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
