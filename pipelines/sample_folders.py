"""Folders of generated images: a file for each sample, a record of them all, and a sheet of the first."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.file_names import is_below
from common.files import atomic_file, json_value
from common.owned_folder import SHEET_NAME
from common.wording import counted
from pipelines.pictures import class_rows, contact_sheet, in_columns, is_complete_png

SAMPLES_NAME = "samples.jsonl"
NPZ_NAME = "samples.npz"
SHEET_COLUMNS = 10
SHEET_IMAGES = 100  # on a sheet without class rows


def names(batch: range, num: int) -> list[str]:
    """The files of a batch's samples below `num`."""
    return [f"{i:06d}.png" for i in batch if i < num]


def recorded_samples(out: Path) -> int:
    """How many images the record of an earlier run names, as far as they are all there."""
    try:
        files = [json_value(line)["file"] for line in (out / SAMPLES_NAME).read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0
    return len(files) if all(is_below(file) and is_complete_png(out / file) for file in files) else 0


def write_samples(
    out: Path, settings: dict[str, Any], labels: list[int] | None, num: int, class_names: Sequence[str] | None
) -> None:
    """samples.jsonl: one line an image, with all it takes to make it again."""
    with atomic_file(out / SAMPLES_NAME) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i in range(num):
            label = None if labels is None else labels[i]
            name = class_names[label] if class_names and label is not None and label < len(class_names) else None
            sample = {
                **settings,
                "file": f"{i:06d}.png",
                "index": i,
                "label": label,
                "class_name": name,
            }
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def sheet(out: Path, num: int, labels: list[int] | None, class_names: Sequence[str] | None) -> Image.Image:
    """The first images on one page; a row for each class where the classes took turns."""

    def picture(i: int) -> Image.Image:
        with Image.open(out / f"{i:06d}.png") as image:
            return image.copy()

    if labels is None or num < 2 * len(set(labels)):
        return contact_sheet(in_columns([picture(i) for i in range(min(num, SHEET_IMAGES))], SHEET_COLUMNS))
    rows = class_rows(labels, SHEET_COLUMNS)
    names = [class_names[labels[row[0]]] if class_names else str(labels[row[0]]) for row in rows]
    return contact_sheet([[picture(i) for i in row] for row in rows], names)


def write_npz(out: Path, num: int, labels: Sequence[int] | None) -> None:
    """samples.npz, of the first images of a folder, as the evaluator of ADM reads it (Dhariwal and Nichol 2021,
    arXiv:2105.05233): `arr_0`, uint8 num H W 3, grey images with three equal channels, since it takes no others, and
    `arr_1`, int64 num, the classes where there are any. One image is in memory at a time, and the same images make the
    same file."""

    def pixels(i: int) -> np.ndarray:
        with Image.open(out / f"{i:06d}.png") as image:
            return np.asarray(image.convert("RGB"))

    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *pixels(0).shape)}
    with atomic_file(out / NPZ_NAME) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(num):
                file.write(pixels(i).tobytes())
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, np.array(labels[:num], dtype=np.int64))


def summary(out: Path, num: int, made: int, *, as_npz: bool) -> str:
    """One line that says what was made and where; made: how many of the images are new."""
    archive = f", all in {out / NPZ_NAME}" if as_npz else ""
    return (
        f"{counted(num, 'image')} in {out}, {made} of them new{archive}; the first are on {out / SHEET_NAME}, settings "
        f"in {out / SAMPLES_NAME}"
    )
