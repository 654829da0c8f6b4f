"""Whether a result was made of the files as they are now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from common.sources import SOURCES_NAME, Sources, times_of


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two sources of one result, `out/r`, which is newer."""
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(b"first")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "r").write_bytes(b"result")
    return paths


def set_time(path: Path, seconds: float) -> None:
    now = os.stat(path).st_mtime_ns + int(seconds * 1e9)
    os.utime(path, ns=(now, now))


def test_changed_bytes_are_seen_even_with_an_older_time_and_the_same_size(tmp_path: Path, files):
    Sources(tmp_path / "out").add("r", files)
    assert Sources(tmp_path / "out").is_current("r", files)
    files[1].write_bytes(b"other")
    set_time(files[1], -1000)
    assert not Sources(tmp_path / "out").is_current("r", files)


def test_what_was_touched_or_copied_is_the_same(tmp_path: Path, files, monkeypatch):
    Sources(tmp_path / "out").add("r", files)
    set_time(files[0], 1000)
    assert Sources(tmp_path / "out").is_current("r", files)
    shutil.copytree(tmp_path / "images", tmp_path / "moved", copy_function=shutil.copyfile)
    moved = [tmp_path / "moved" / path.name for path in files]
    assert Sources(tmp_path / "out").is_current("r", moved)
    monkeypatch.setattr("common.sources.contents_of", None)  # the new times are recorded: nothing is read again
    assert Sources(tmp_path / "out").is_current("r", moved)


def test_without_a_record_a_newer_result_counts(tmp_path: Path, files):
    sources = Sources(tmp_path / "out")
    set_time(files[0], -10)
    set_time(files[1], 1000)
    assert not sources.is_current("r", files)
    set_time(files[1], -1010)
    assert sources.is_current("r", files)
    assert sources.read().keys() == {"r"}  # a process was killed before it could record it: from now on it is


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path, files):
    times = times_of(files)
    files[0].write_bytes(b"second")
    Sources(tmp_path / "out").add("r", files, times)
    assert not Sources(tmp_path / "out").is_current("r", files)
    Sources(tmp_path / "out").add("r", files, times_of(files))
    assert Sources(tmp_path / "out").is_current("r", files)


def test_sources_that_only_moved_are_told_from_others(tmp_path: Path, files):
    sources = Sources(tmp_path / "out")
    assert not sources.are_at({"r": files})  # nothing is recorded
    sources.add("r", files)
    moved = [path.rename(tmp_path / path.name) for path in files]
    assert sources.are_at({"r": moved, "another": files})
    assert not sources.are_at({"another": moved})
    moved[0].write_bytes(b"other")
    assert not sources.are_at({"r": moved})


def test_a_line_that_was_cut_is_passed_over_and_one_line_a_result_is_left(tmp_path: Path, files):
    record = tmp_path / "out" / SOURCES_NAME
    for result in ("r", "s", "r", "q"):
        Sources(tmp_path / "out").add(result, files)
    record.write_text(record.read_text() + '{"result": "t", "ti')
    sources = Sources(tmp_path / "out")
    assert sorted(sources.marks) == ["q", "r", "s"]
    sources.finish()
    assert [json.loads(line)["result"] for line in record.read_text().splitlines()] == ["q", "r", "s"]


def test_a_source_that_vanished_is_no_error(tmp_path: Path, files):
    Sources(tmp_path / "out").add("r", files)
    files[0].unlink()
    assert not Sources(tmp_path / "out").is_current("r", files)
