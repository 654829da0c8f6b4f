from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import (
    atomic_file,
    atomic_folder,
    check_replaceable,
    read_json,
    remove_leftovers,
    sha256_of_file,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(number: int):
    def failing(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return failing


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "a.txt").write_text(text)


def write_half_a_file(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("in the middle")


def write_half_a_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "b.txt").write_text("half")
        raise RuntimeError("in the middle")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_half_a_file(path)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "model"
    write_folder(path, "old")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_half_a_folder(path)
    assert names(path) == ["a.txt"]
    write_folder(path, "new")
    assert (path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_a_folder_whose_last_move_fails_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    write_folder(path, "old")
    replace = os.replace

    def failing(source, target):
        if Path(source).suffix == ".tmp":
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="input/output"):
        write_folder(path, "new")
    assert (path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_ctrl_c_between_the_two_moves_of_a_folder_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    write_folder(path, "old")
    replace = os.replace

    def interrupted(source, target):
        if Path(source).suffix == ".tmp":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, "new")
    assert (path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_folder_that_can_be_neither_replaced_nor_put_back_is_kept_under_its_temporary_name(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_folder(path, "old")
    replace = os.replace

    def failing(source, target):
        if Path(target) == path:
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="input/output"):
        write_folder(path, "new")
    monkeypatch.undo()
    assert not path.exists()
    remove_leftovers(tmp_path)
    assert (path / "a.txt").read_text() == "old"


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path: Path):
    (tmp_path / "large_disk").mkdir()
    write_folder(tmp_path / "large_disk" / "model", "old")
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "large_disk" / "model")
    write_folder(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "large_disk" / "model" / "a.txt").read_text() == "new"
    (tmp_path / ".model.12.old").symlink_to(tmp_path / "large_disk")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["large_disk", "model"]
    assert names(tmp_path / "large_disk") == ["model"]


def test_only_what_zellige_wrote_is_replaced(tmp_path: Path):
    """Models of other libraries have a config.json too."""
    write_json(tmp_path / "llama" / "config.json", {"model_type": "llama"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("no json")
    write_json(tmp_path / "ours" / "config.json", {"kind": "vqvae", "zellige_version": "0.1.0"})
    (tmp_path / "empty").mkdir()
    for name in ("ours", "empty", "absent"):
        check_replaceable(tmp_path / name, "config.json")
    for name in ("llama", "text"):
        with pytest.raises(UserError, match="is something else than a model folder, so it is left alone"):
            check_replaceable(tmp_path / name, "config.json")


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (
            errno.ENOSPC,
            "the disk is full: .*a.json was not written, and what stood there before is untouched",
        ),
        (errno.EDQUOT, "the disk is full: .*a.json was not written"),
        (errno.EACCES, "no permission to write .*a.json; choose another folder"),
    ],
)
def test_what_the_disk_refuses_is_one_sentence(tmp_path, monkeypatch, number: int, sentence: str):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", fail(number))
    with pytest.raises(UserError, match=sentence):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_leftovers_of_a_kill_are_removed_and_a_folder_caught_between_moves_comes_back(tmp_path: Path):
    write_folder(tmp_path / "model", "new")
    write_folder(tmp_path / ".model.12.old", "old")  # killed after both moves, before the clean-up
    write_folder(tmp_path / ".step_00000003.12.old", "three")  # killed between the two moves
    write_folder(tmp_path / ".step_00000003.12.tmp", "half")
    (tmp_path / ".metrics.jsonl.12.tmp").write_text("half")
    (tmp_path / ".gitignore").write_text("not ours")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".gitignore", "model", "step_00000003"]
    assert (tmp_path / "model" / "a.txt").read_text() == "new"
    assert (tmp_path / "step_00000003" / "a.txt").read_text() == "three"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "does not exist"), (b'{"a": ', "is not valid JSON"), (b"\xff", "is not valid JSON")],
)
def test_json_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None, sentence: str):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_json(tmp_path / "a.json")


def test_json_round_trip_keeps_letters_readable(tmp_path: Path):
    write_json(tmp_path / "a.json", {"Zellīj": [1, 2.5, None]})
    assert "Zellīj" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"Zellīj": [1, 2.5, None]}


def test_checksum_is_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
