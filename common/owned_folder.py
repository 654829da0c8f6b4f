"""A folder belongs to the command that began it: no other writes there, and it writes nothing among files of others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from common.runs import RUN_CONFIG_NAME, config_of_run, is_config_of_run

SETTINGS_NAME = "settings.json"  # of commands that write images, .zlg files and exports; "command" says which one
SHEET_NAME = "sheet.png"  # the first results, in one picture
TRAINING = "train"  # both stages; they tell each other's runs apart by the config

# Settings that only this command has: folders that were begun before the command was recorded tell it by them.
SETTINGS_OF = {
    "generate": {"model", "seed", "candidates"},
    "inpaint": {"model", "images", "variants", "keep"},
    "vary": {"model", "images", "variants", "share"},
    "reconstruct": {"model", "images", "alone"},
    "compress": {"model", "images", "lanes"},
    "codes export": {"codes", "format", "images_per_file"},
}
RUN_FILES = ("checkpoints", "metrics.jsonl", "timing.jsonl", "model")  # one of them stands beside a run's config.yaml

# What people, job systems and file managers leave in a folder, and no command of ours takes for anything.
HARMLESS_NAMES = {"Thumbs.db", "desktop.ini", "stdout", "stderr"}
HARMLESS = re.compile(r".*\.(log|out|err|txt|md|sh|sbatch|slurm|pid|yaml|yml|[oe]\d+)", re.IGNORECASE)


def check_owner(folder: Path, command: str, option: str = "--out") -> None:
    """Raises UserError unless `zellige COMMAND` may write to `folder`: it began it, or nothing is there, hidden files,
    logs and notes aside."""
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected a folder to write to; name another {option} folder")
    owner = owner_of(folder)
    if owner == command:
        return
    began = f"which `zellige {owner}` began" if owner else "which this command did not write"
    for file in foreign_files(folder, unless=SETTINGS_NAME if owner else None):  # it may have written nothing yet
        what = f"{folder} is a folder {began}" if owner else f"{folder} holds {file}, {began}"
        raise UserError(f"{what}; name another {option} folder")


def foreign_files(folder: Path, unless: str | None = SETTINGS_NAME) -> list[Path]:
    """Files of a folder, relative to it, that are neither harmless nor called `unless`."""
    return [
        file
        for file in files_below(folder)
        if str(file) != unless
        and (str(file) == RUN_CONFIG_NAME or not (HARMLESS.fullmatch(file.name) or file.name in HARMLESS_NAMES))
    ]


def owner_of(folder: Path) -> str | None:
    """The command that began a folder, as `zellige` calls it; None where nothing tells."""
    if (folder / SETTINGS_NAME).is_file():
        settings: dict[str, Any] = {}
        with suppress(UserError):
            settings = read_json(folder / SETTINGS_NAME)
        if "command" in settings:
            return str(settings["command"])
        if settings.keys() == {"files"} and isinstance(settings["files"], str):
            return "decompress"
        return next((command for command, names in SETTINGS_OF.items() if names <= settings.keys()), None)
    for index in (folder / "index.json", folder / "unfinished" / "index.json"):
        with suppress(UserError):
            if (
                index.is_file()
                and "shards" in (found := read_json(index))
                and found.keys() & {"code_spec", "latent_spec"}
            ):
                return "encode"
    if (folder / RUN_CONFIG_NAME).is_file() and (
        any((folder / name).exists() for name in RUN_FILES) or is_config_of_run(config_of_run(folder))
    ):
        return TRAINING
    if (folder / "stage1" / RUN_CONFIG_NAME).is_file():
        return "quickstart"
    if is_walk(folder):
        return "interpolate"
    return None


def is_walk(folder: Path) -> bool:
    """Whether a folder holds what `interpolate` wrote when it recorded no settings."""
    names = {str(file) for file in files_below(folder)} if (folder / "step_00.png").is_file() else set()
    return SHEET_NAME in names and all(name == SHEET_NAME or re.fullmatch(r"step_\d+\.png", name) for name in names)


def files_below(folder: Path) -> Iterator[Path]:
    """Files of a folder and its subfolders, relative to it, hidden ones left out; what cannot be looked into counts as
    empty. Those of the folder itself come first."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(place, name).relative_to(folder)
