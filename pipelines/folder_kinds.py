"""What a folder is, told by the files in it, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import json_value
from common.runs import SEQUENCE, TABLE, VAE, stage_of_run

ASSEMBLED, QUICKSTART = "an assembled model", "a run of quickstart"
SHARDS, LATENT_SHARDS = "a folder of code shards", "a folder of latent shards"
COMPRESSED = "a folder of .zlg files"
PARTS_NAME = "images.parts"  # folder of the batches of an archive that `zellige compress` is making, beside it


class FolderKind(NamedTuple):
    what: str  # as in "models/x is WHAT"
    then: str  # the command that shows or uses it


def kind_of_folder(folder: Path) -> FolderKind | None:
    """None for a folder of something else: images, or nothing of ours."""
    if (folder / "model_index.json").is_file():
        return FolderKind(ASSEMBLED, f"zellige generate --model {folder} --num 64 --out IMAGES")
    if (folder / "config.json").is_file() and (kind := json_of(folder / "config.json").get("kind")):
        shown = use_of(folder, kind) or f"zellige reconstruct --model {folder} --images IMAGES --out RECONSTRUCTED"
        if "stage1_fingerprint" in json_of(folder / "config.json").get("arguments", {}):
            shown = f"zellige assemble --stage1 RUN --stage2 {folder} --out MODEL"
        return FolderKind(f"a model of kind {kind}", shown)
    if stage := stage_of_run(folder):
        then = f"zellige assemble --stage1 RUN --stage2 {folder} --out MODEL"
        if stage == "stage one":
            then = after_stage_one(folder)
        elif stage == VAE:
            then = f"zellige generate --model {folder} --num 64 --out IMAGES"
        elif stage in (TABLE, SEQUENCE):
            kind = json_of(folder / "model" / "config.json").get("kind", "")
            then = use_of(folder, kind) or f"zellige report {folder} --out PAGE"
        return FolderKind(f"a run of {stage}", then)
    if (folder / "model" / "model_index.json").is_file():
        return FolderKind(QUICKSTART, f"zellige generate --model {folder} --num 64 --out IMAGES")
    if (folder / "index.json").is_file():
        index = json_of(folder / "index.json")
        for spec, kind in (("code_spec", SHARDS), ("latent_spec", LATENT_SHARDS)):
            if spec in index:
                return FolderKind(kind, f"zellige codes info --codes {folder}")
    if next(files_of(folder, ".zlg"), None) is not None:
        return FolderKind(COMPRESSED, f"zellige info --file {folder}")
    return None


def after_stage_one(run: Path) -> str:
    """The command that goes on from a run of stage one: its codes are to be made, or those of another model, which
    stayed as they were, are there already, as a prior of them may be."""
    if "codes_maker" in json_of(run / "model" / "config.json").get("arguments", {}):
        return f"zellige assemble --stage1 {run} --stage2 PRIOR --out MODEL"
    return f"zellige encode --model {run} --out CODES"


def use_of(folder: Path, kind: str) -> str | None:
    """The command that uses a model of a table or of sequences; None of one of images."""
    return {
        "miwae": f"zellige impute --model {folder} --table TABLE.csv --out FILLED.csv",
        "counts": f"zellige encode-table --model {folder} --table TABLE.csv --out LATENTS.csv",
        "sequence": f"zellige write --model {folder} --num 20 --out WRITTEN",
    }.get(kind)


def check_draws_images(folder: Path) -> None:
    """Raises UserError, which names the command to use, for a model of a table or of sequences."""
    inside = next((place for place in (folder, folder / "model") if (place / "config.json").is_file()), folder)
    if use := use_of(folder, kind := json_of(inside / "config.json").get("kind", "")):
        raise UserError(f"{folder} is a model of kind {kind}, expected one of images; try: {use}")


def check_kind(folder: Path, expected: str, advice: str, *, among: Sequence[str] = (), but: Sequence[str] = ()) -> None:
    """Raises UserError, which ends in `advice`, for a file, and for a folder whose kind is not `among` or is one of
    `but`. A folder without a kind passes, and so does what is not there: who reads it knows more."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected {expected}; {advice}")
    kind = kind_of_folder(folder)
    if kind is not None and ((among and kind.what not in among) or kind.what in but):
        raise UserError(f"{folder} is {kind.what}, expected {expected}; {advice}")


def json_of(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none."""
    try:
        value = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def files_of(folder: Path, suffix: str) -> Iterator[Path]:
    """Files below a folder that end in `suffix`; hidden ones are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(files) if name.endswith(suffix) and not name.startswith("."))


def compressed_files(folder: Path) -> list[Path]:
    """The .zlg files below a folder but those of archives that are being made: their images will be in these. Raises
    UserError where there are no others."""
    files = list(files_of(folder, ".zlg"))
    whole = [file for file in files if file.parent.name != PARTS_NAME]
    if files and not whole:
        raise UserError(
            f"{folder} holds an archive that is not finished; give the command again by which `zellige compress` began "
            "it, or wait for it"
        )
    return whole
