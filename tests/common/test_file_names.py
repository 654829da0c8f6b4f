"""Names in files lead nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from codes.shard_folder import Shard
from codes.shards import CodeDataset
from codes.spec import CodeSpec
from common import file_names
from common.errors import UserError
from common.file_names import is_below, is_plain
from common.files import read_json, write_json
from tests.codes.test_codes import write_folder
from training.checkpoint import Checkpoints

ELSEWHERE = ["..", "../a", "a/../b", "/a", "/", "", ".", "a//b", "./a", "a/", "a\0b", "x" * 300, "\ud800", 7, None]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_paths_that_lead_elsewhere(name: object):
    assert not is_below(name)
    assert not is_plain(name)


@pytest.mark.parametrize("name", ["a", "a.png", "a/b.png", "..a", "a..", "con", "ä/ö", "a b", "\udcff"])
def test_paths_below_a_folder(name: str):
    assert is_below(name)
    assert is_plain(name) == ("/" not in name)


@pytest.mark.parametrize("name", ["a\\b", "c:a", "c:\\a", "c:/a"])
def test_a_name_without_a_path_is_one_on_every_system(name: str):
    assert not is_plain(name)


@pytest.mark.parametrize(
    "name",
    ["a\\..\\b", "\\\\host\\a", "c:a", "c:/a", "CON", "con.png", "a/nul .txt", "COM1.x", "lpt³", "a.", "a ", ".. "],
)
def test_names_that_windows_takes_otherwise(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_names, "WINDOWS", True)
    assert not is_below(name)
    assert is_below("a\\b\\constant.com1")


def test_an_index_names_shards_of_its_own_folder(tmp_path: Path):
    write_folder(tmp_path / "codes")
    assert len(CodeDataset(tmp_path / "codes"))
    index = read_json(tmp_path / "codes" / "index.json")
    del index["sha256"]  # as who edits it would
    file = index["shards"][0]["file"]
    for other in (f"../codes/{file}", str(tmp_path / "codes" / file)):  # the same file, by another way
        index["shards"][0]["file"] = other
        write_json(tmp_path / "codes" / "index.json", index)
        with pytest.raises(UserError, match=r"is not an index of code shards .*is no file of its folder"):
            CodeDataset(tmp_path / "codes")
    with pytest.raises(TypeError):
        Shard("a/b", "train")


def test_grids_whose_codes_are_exported_as_files_have_names_of_files():
    value = {"grids": [{"name": "../a", "height": 1, "width": 1, "vocabulary": 2}], "image_height": 1, "image_width": 1}
    with pytest.raises(UserError, match=r"a grid is called '\.\./a'"):
        CodeSpec.from_json(value)


def test_a_manifest_names_files_of_its_own_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(3, {}, {}, None)
    assert checkpoints.damage(3) is None
    manifest = read_json(checkpoints.path(3) / "manifest.json")
    manifest["files"]["../step_00000003/state.json"] = manifest["files"]["state.json"]
    write_json(checkpoints.path(3) / "manifest.json", manifest)
    assert "which is no file of it" in str(checkpoints.damage(3))
