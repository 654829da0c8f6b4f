"""Folders of generated images: a file for each sample, a record of them all, and a sheet of the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import atomic_file
from pipelines.pictures import class_rows, contact_sheet, in_columns, is_complete_png

SAMPLES_NAME = "samples.jsonl"
SHEET_COLUMNS = 10
SHEET_IMAGES = 100  # on a sheet without class rows


def names(batch: range, num: int) -> list[str]:
    """The files of a batch's samples below `num`."""
    return [f"{i:06d}.png" for i in batch if i < num]


def recorded_samples(out: Path) -> int:
    """How many images the record of an earlier run names, as far as they are all there."""
    try:
        files = [json.loads(line)["file"] for line in (out / SAMPLES_NAME).read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError, KeyError):
        return 0
    return len(files) if all(is_complete_png(out / file) for file in files) else 0


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
