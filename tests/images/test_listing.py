"""The list of a large folder is kept, and taken only while it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from images import listing
from images.listing import listing_of, scan_folder
from images.sources import FileSource, open_source


@pytest.fixture(autouse=True)
def small_and_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Lists of three files and more are kept, and folders that have just changed count as settled. Gives the folders
    that were looked into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 3)
    monkeypatch.setattr(listing, "SETTLED", -3600.0)
    looked: list[Path] = []

    def looking(root: Path) -> Any:
        looked.append(root)
        return scan_folder(root)

    monkeypatch.setattr(listing, "scan_folder", looking)
    return looked


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "b/old.heic", "c/notes.txt", "z/caf\udce9.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    return tmp_path / "photos"


def test_a_second_look_takes_the_list_that_was_kept(root: Path, small_and_quiet: list[Path]) -> None:
    first, second = listing_of(root), listing_of(root)
    assert small_and_quiet == [root]
    assert second.paths.tolist() == first.paths.tolist() == [b"a/1.png", b"a/deep/2.png", b"b/3.png", b"z/caf\xe9.png"]
    assert second.unread == first.unread == {".heic": 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a" / "deep" / "new.png").touch(),
        lambda root: (root / "c" / "new.png").touch(),  # a folder without images counts too
        lambda root: (root / "b" / "3.png").unlink(),
        lambda root: (root / "b" / "3.png").rename(root / "b" / "4.png"),
        lambda root: (root / "new folder").mkdir(),
        lambda root: (root / "a" / "deep").rename(root / "b" / "deep"),
    ],
)
def test_whatever_changes_a_folder_has_it_listed_anew(root: Path, small_and_quiet: list[Path], change: Any) -> None:
    listing_of(root)
    change(root)
    assert listing_of(root).paths.tolist() == scan_folder(root).paths.tolist()
    assert len(small_and_quiet) == 2
    listing_of(root)
    assert len(small_and_quiet) == 2


def test_a_folder_that_changed_just_now_is_not_trusted(
    root: Path, small_and_quiet: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time would be the same after one more change."""
    monkeypatch.setattr(listing, "SETTLED", 5.0)
    listing_of(root)
    listing_of(root)
    assert len(small_and_quiet) == 2


def test_relist_looks_in_any_case(root: Path, small_and_quiet: list[Path]) -> None:
    listing_of(root)
    listing_of(root, relist=True)
    assert len(small_and_quiet) == 2


def test_lists_of_few_files_are_not_kept(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "KEPT_FROM", 5)
    listing_of(root)
    assert not (tmp_path / "cache").exists()


def test_a_list_that_is_damaged_or_cannot_be_kept_costs_time_alone(
    tmp_path: Path, root: Path, small_and_quiet: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    listing_of(root)
    (kept,) = (tmp_path / "cache" / "zellige" / "listings").iterdir()
    whole = kept.read_bytes()
    for number, damaged in enumerate((b"", whole[: len(whole) // 2], whole[:200] + b"x" * 9 + whole[209:], b"no zip")):
        kept.write_bytes(damaged)
        assert len(listing_of(root).paths) == 4
        assert len(small_and_quiet) == number + 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(listing_of(root).paths) == 4


def test_a_file_that_is_gone_all_the_same_is_told_by_its_name(tmp_path: Path, root: Path) -> None:
    """A link whose target went changes no folder."""
    Image.new("L", (4, 4)).save(tmp_path / "target.png")
    os.symlink(tmp_path / "target.png", root / "a" / "link.png")
    assert len(listing_of(root).paths) == 5
    (tmp_path / "target.png").unlink()
    source = open_source(str(root), "train", Path())
    assert isinstance(source, FileSource)
    assert len(source) == 5
    index = int(np.flatnonzero(source.paths == b"a/link.png")[0])
    assert source.still_bad(str(root / "a" / "link.png"))
    assert source.name(index) == "a/link.png"
    assert not source.still_bad(str(root / "a" / "other.png"))
