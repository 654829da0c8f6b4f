"""Every folder is one command's, told by what it holds: also those of builds before, which recorded no owner."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_json
from common.owned_folder import check_owner, owner_of

EARLIER = Path(__file__).parents[1] / "earlier_builds"
COMMANDS = ["generate", "inpaint", "vary", "interpolate", "reconstruct", "compress", "decompress", "encode", "train"]


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(
    ("settings", "result", "owner"),
    [
        ({"model": "a", "seed": 0, "batch_size": 2, "candidates": 1, "judge": None}, "000000.png", "generate"),
        ({"model": "a", "keep": "left", "images": "i", "variants": 4}, "a_0.png", "inpaint"),
        ({"model": "a", "share": 0.3, "images": "i", "variants": 4}, "a_0.png", "vary"),
        ({"model": "a", "images": "i", "max_side": None, "alone": True}, "a.png", "reconstruct"),
        ({"model": "a", "images": "i", "mode": "packed", "lanes": 8}, "a.zlg", "compress"),
        ({"files": "small"}, "a.png", "decompress"),
        ({"codes": "a", "format": "npz", "images_per_file": None}, "train.npz", "codes export"),
    ],
)
def test_folders_of_builds_before_are_known_by_their_settings(tmp_path: Path, settings, result, owner):
    write_json(tmp_path / "settings.json", settings)
    write_files(tmp_path, result)
    assert owner_of(tmp_path) == owner
    check_owner(tmp_path, owner)
    for other in set(COMMANDS) - {owner}:
        with pytest.raises(UserError) as refused:
            check_owner(tmp_path, other)
        assert str(refused.value) == (
            f"{tmp_path} is a folder which `zellige {owner}` began; name another --out folder"
        )


@pytest.mark.parametrize(
    ("kept", "owner"),
    [("generated", "generate"), ("shards", "encode"), ("begun/stage1", "train"), ("begun/stage2", "train")],
)
def test_what_the_build_before_wrote_goes_on(tmp_path: Path, kept: str, owner: str):
    folder = shutil.copytree(EARLIER / kept, tmp_path / "copy")
    assert owner_of(folder) == owner
    for command in COMMANDS:
        if command == owner:
            check_owner(folder, command)
        else:
            with pytest.raises(UserError, match=f"`zellige {owner}` began; name another --run folder"):
                check_owner(folder, command, "--run")


@pytest.mark.parametrize("settings", [{"files": ["a.js", "b.js"]}, {"share": 0.3}, {"keep": True, "candidates": 3}])
def test_settings_of_somebody_else_are_not_taken_for_ours(tmp_path: Path, settings):
    write_json(tmp_path / "settings.json", settings)
    assert owner_of(tmp_path) is None
    for command in COMMANDS:
        with pytest.raises(UserError, match=r"holds settings\.json, which this command did not write"):
            check_owner(tmp_path, command)


def test_what_was_stopped_at_its_beginning_is_known_too(tmp_path: Path):
    write_json(tmp_path / "codes" / "unfinished" / "index.json", {"code_spec": {}, "shards": []})
    assert owner_of(tmp_path / "codes") == "encode"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {kind: vqvae}\ntrain: {steps: 5, save_every: 2}\n")
    assert owner_of(tmp_path / "run") == "train"
    write_files(tmp_path / "walk", "step_00.png", "step_01.png", "sheet.png")
    assert owner_of(tmp_path / "walk") == "interpolate"
    write_files(tmp_path / "photos", "step_00.png", "step_01.png", "sheet.png", "cat.png")
    assert owner_of(tmp_path / "photos") is None
    write_files(tmp_path / "quick", "stage1/config.yaml", "samples.png")
    check_owner(tmp_path / "quick", "quickstart", "--run")


def test_the_recorded_command_counts(tmp_path: Path):
    write_json(tmp_path / "settings.json", {"command": "inpaint", "candidates": 1, "keep": "left"})
    write_files(tmp_path, "a.png")
    check_owner(tmp_path, "inpaint")
    with pytest.raises(UserError, match="`zellige inpaint` began"):
        check_owner(tmp_path, "generate")


@pytest.mark.parametrize(
    "foreign",
    ["cat.jpg", "sub/deep/cat.png", "codes-0.safetensors", "config.yaml", "index.json", "settings.json", "script.py",
     "model/weights.pt", "LICENSE"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "encode", "train"])
def test_nothing_is_written_among_files_of_others(tmp_path: Path, foreign: str, command: str):
    write_files(tmp_path, foreign)
    with pytest.raises(UserError) as refused:
        check_owner(tmp_path, command)
    assert str(refused.value) == (
        f"{tmp_path} holds {foreign}, which this command did not write; name another --out folder"
    )


@pytest.mark.parametrize("command", ["generate", "encode", "train"])
def test_hidden_files_logs_and_notes_are_in_nobody_s_way(tmp_path: Path, command: str):
    check_owner(tmp_path / "absent", command)
    check_owner(tmp_path, command)
    write_files(
        tmp_path, ".DS_Store", ".ipynb_checkpoints/a.png", ".git/config", "._cat.jpg", "Thumbs.db", "slurm-123.out",
        "logs/123.err", "job.o4711", "stdout", "README.md", "job.sbatch", "my_recipe.yaml", "bad_files.txt",
        ".a.png.12.tmp",
    )  # fmt: skip
    (tmp_path / "empty" / "folders").mkdir(parents=True)
    check_owner(tmp_path, command)


def test_a_command_that_wrote_nothing_leaves_the_folder_to_others(tmp_path: Path):
    write_json(tmp_path / "settings.json", {"command": "generate"})
    check_owner(tmp_path, "compress")
    write_files(tmp_path, "000000.png")
    with pytest.raises(UserError, match="`zellige generate` began"):
        check_owner(tmp_path, "compress")


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out is a file, expected a folder to write to; name another --out folder"):
        check_owner(tmp_path / "out", "generate")
