"""docs/benchmarks.md is what its benchmarks printed, and each of them is one that there is."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.page import PAGE, RECORD, SECTIONS, Section


def test_the_page_is_that_of_the_record():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page.page(record), "run python -m benchmarks.page"
    assert record.keys() <= {section.title for section in SECTIONS}, "figures of a section that is gone"
    assert sum(found["minutes"] for found in record.values()) < 105, "`make bench` promises two hours in all"


@pytest.mark.parametrize("section", SECTIONS, ids=[section.title for section in SECTIONS])
def test_its_command_is_one_that_there_is(section: Section):
    name = section.command.split()[0]
    assert find_spec(f"benchmarks.{name}") is not None
    given = section.command + (section.cuda or "") + ("--device" if section.cuda is not None else "")
    source = (page.ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    for option in (word for word in given.split() if word.startswith("--")):
        assert f'"{option}"' in source, f"benchmarks.{name} has no option {option}"


def test_tables_are_kept_and_a_command_without_one_is_kept_whole():
    printed = "a bar\ntorch 2\n\n| a |\n|---|\n| 1 |\nmissed: none\nsecond\n\n| b |\n"
    assert page.said(printed) == ["torch 2", "", "| a |", "|---|", "| 1 |", "", "second", "", "| b |"]
    several = "| a |\n|---|\n| 1 |\n\n| b |\n|---|\n| 2 |\n"
    assert page.said(several) == ["| a |", "|---|", "| 1 |", "", "| b |", "|---|", "| 2 |"]
    assert page.said("memory 3 MB\n\nin 2 runs\n") == ["memory 3 MB", "in 2 runs"]


@pytest.mark.parametrize(("ends_with", "told"), [("0", True), ("1", True), ("3", False), ("error", False)])
def test_a_missed_bound_is_told_and_a_crash_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_with: str, told: bool
):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    script = "import os, sys\nprint('| ' + os.environ['OMP_NUM_THREADS'] + ' |')\nsys.exit(int(sys.argv[1]))\n"
    (tmp_path / "benchmarks" / "speed.py").write_text(script)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    section = Section("Speed", f"speed {ends_with}", "How fast.")
    if not told:
        with pytest.raises(RuntimeError, match=r"ended with [13]: "):
            page.run(section, {}, "cpu")
        return
    found = page.run(section, {}, "cpu")
    assert [(one["threads"], one["lines"]) for one in found["runs"]] == [(1, ["| 1 |"]), (2, ["| 2 |"])]
    text = page.page({"Speed": found}, (section,))
    assert "One thread" in text
    assert "| 2 |" in text
