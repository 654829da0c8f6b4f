"""A folder of results is one command's, with one set of settings; what another wrote is left as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.folder_lock import held
from common.processes import process_state
from pipelines.commands.compress import CompressConfig, compress_files
from pipelines.commands.decompress import DecompressConfig, decompress_files
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.settings import check_settings, recorded_settings, results_folder

Write = Callable[[str], str]


@pytest.fixture(scope="module")
def commands(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Write]:
    """Each command, which needs but the name of its --out folder."""
    images = tmp_path_factory.mktemp("images")
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(images / "a.png")
    small = tmp_path_factory.mktemp("small") / "zlg"
    compress = CompressConfig(model=str(model), images=str(images), out=str(small))
    compress_files(compress)
    given = {"model": str(model), "images": str(images)}
    return {
        "generate": lambda out: generate_files(GenerateConfig(model=str(model), out=out, num=2)),
        "reconstruct": lambda out: reconstruct_files(ReconstructConfig(**given, out=out)),
        "compress": lambda out: compress_files(CompressConfig(**given, out=out)),
        "decompress": lambda out: decompress_files(DecompressConfig(model=str(model), files=str(small), out=out)),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("second", ["generate", "reconstruct", "compress", "decompress"])
@pytest.mark.parametrize("first", ["generate", "reconstruct", "compress", "decompress"])
def test_a_folder_belongs_to_the_command_that_began_it(tmp_path: Path, commands, first: str, second: str):
    out = tmp_path / "out"
    commands[first](str(out))
    before = contents(out)
    assert json.loads(before["settings.json"])["command"] == first
    if first == second:
        commands[second](str(out))
    else:
        with pytest.raises(UserError, match=f"out is a folder which `zellige {first}` began; name another --out"):
            commands[second](str(out))
    assert contents(out) == before


@pytest.mark.parametrize("command", ["generate", "reconstruct", "compress", "decompress"])
def test_folders_of_the_build_before_go_on(tmp_path: Path, commands, command: str):
    out = tmp_path / "out"
    commands[command](str(out))
    settings = json.loads((out / "settings.json").read_text())
    for new in ("command", "crop", "max_side" if command == "compress" else "command", "judge_weights"):
        settings.pop(new, None)
    if command == "compress":
        settings["lanes"] = 8  # which version 1 of the format had, and tells whose folder it is
    (out / "settings.json").write_text(json.dumps(settings))
    (out / "sources.jsonl").unlink(missing_ok=True)
    results = {name: data for name, data in contents(out).items() if name not in ("settings.json", "psnr.json")}
    commands[command](str(out))
    after = contents(out)
    assert {name: after[name] for name in results if name != "samples.jsonl"}.items() <= results.items()
    assert json.loads(after["settings.json"])["command"] == command


@pytest.mark.parametrize("command", ["generate", "reconstruct", "compress", "decompress"])
def test_nothing_is_mixed_with_files_of_others(tmp_path: Path, commands, command: str):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds index\.json, which this command did not write; name another --out"):
        commands[command](str(tmp_path))
    assert contents(tmp_path) == {"index.json": b"{}"}
    (tmp_path / "index.json").rename(tmp_path / ".index.json")
    commands[command](str(tmp_path))


def test_another_that_writes_there_is_waited_for(tmp_path: Path, commands):
    half_written = tmp_path / f".000000.png.{os.getpid()}.tmp"
    with held(tmp_path, "generate"):
        half_written.write_bytes(b"half")  # which would be cleared away if the other had been killed
        for write in commands.values():
            with pytest.raises(UserError, match="is writing to"):
                write(str(tmp_path))
        assert half_written.exists()


def test_a_record_without_results_goes_again(tmp_path: Path):
    out = tmp_path / "out"
    with results_folder(out, "generate", {"seed": 1}, process_state()):
        assert json.loads((out / "settings.json").read_text()) == {"command": "generate", "seed": 1}
    assert not out.exists()
    with results_folder(out, "generate", {"seed": 2}, process_state()):
        Image.new("L", (2, 2)).save(out / "a.png")
    assert recorded_settings(out) == {"command": "generate", "seed": 2}


def test_settings_are_compared_with_what_their_absence_meant(tmp_path: Path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "settings.json").write_text(json.dumps({"command": "generate", "seed": 1, "size": [4, 4], "old": 3}))
    defaults = {"min_p": 0.0, "old": 3}
    check_settings(tmp_path, {"seed": 1, "size": (4, 4), "min_p": 0.0}, defaults=defaults)
    with pytest.raises(UserError, match=r": min_p was 0.0 and is now 0.1; give"):
        check_settings(tmp_path, {"seed": 1, "size": (4, 4), "min_p": 0.1}, defaults=defaults)
    with pytest.raises(UserError, match=r": old was 3, which this version does not know; give"):
        check_settings(tmp_path, {"seed": 1, "size": (4, 4)})
    check_settings(tmp_path, {"seed": 2, "size": (4, 4)}, defaults=defaults, may_change={"seed": lambda: True})
    with pytest.raises(UserError, match="seed was 1 and is now 2"):
        check_settings(tmp_path, {"seed": 2, "size": (4, 4)}, defaults=defaults, may_change={"seed": lambda: False})


def test_a_copied_folder_is_still_its_command_s(tmp_path: Path, commands):
    commands["generate"](str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert "0 of them new" in commands["generate"](str(tmp_path / "b"))
