"""Pictures for people: files, rows of sheets (images/sheets.py), training curves."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common.errors import explain_disk_errors
from common.files import atomic_file, temporary_path, written
from images.sheets import contact_sheet as contact_sheet
from images.sheets import to_picture as to_picture
from images.sheets import to_pil as to_pil
from images.sheets import to_pils as to_pils

PNG_BEGIN = b"\x89PNG\r\n\x1a\n"


@contextmanager
def quick_file(path: Path) -> Iterator[Path]:
    """As `atomic_file`, without waiting for the disk, which would cost more than an image: no reader sees half a file,
    but a power failure may damage the last ones. Raises UserError when the disk is full."""
    temporary = temporary_path(path)
    with explain_disk_errors(path), written(temporary):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a PNG file as a `quick_file`; `is_complete_png` tells a damaged one."""
    with quick_file(path) as temporary:
        picture.save(temporary, format="PNG")


def is_complete_png(path: Path) -> bool:
    """Whether a PNG file is there and whole."""
    try:
        return is_whole_png(path.read_bytes())
    except OSError:
        return False


def is_whole_png(data: bytes) -> bool:
    """Whether they are a PNG file from its first chunk to its last, each with the checksum that it says of itself."""
    place = len(PNG_BEGIN)
    if data[:place] != PNG_BEGIN:
        return False
    while place < len(data):  # a chunk: length, kind, content, checksum of the last two
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        end = place + 12 + length
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]) or end > len(data):
            return False
        if kind == b"IEND":
            return end == len(data)
        place = end
    return False


def in_columns(pictures: Sequence[Image.Image], columns: int) -> list[Sequence[Image.Image]]:
    """Pictures as rows of up to `columns`, in reading order."""
    return [pictures[i : i + columns] for i in range(0, len(pictures), columns)]


def class_rows(labels: Sequence[int], columns: int, most_classes: int = 20) -> list[list[int]]:
    """Positions in `labels` of up to `columns` samples of each class: one list a class, classes in order."""
    rows: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        row = rows.setdefault(label, [])
        if len(row) < columns:
            row.append(position)
    return [rows[label] for label in sorted(rows)[:most_classes]]


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one mode and height as one."""
    both = Image.new(left.mode, (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


class Curve(NamedTuple):
    title: str
    metrics: Path  # metrics.jsonl of a run
    name: str  # of the metric


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """One panel a curve, training and validation in one, over the step."""
    from matplotlib.figure import Figure  # heavy, and of no use to the commands that draw none

    figure = Figure(figsize=(4.5 * len(curves), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        lines = [json.loads(line) for line in curve.metrics.read_text(encoding="utf-8").splitlines()]
        for split, style in (("train", "-"), ("validation", "o-")):
            points = [
                (line["step"], line[curve.name])
                for line in lines
                if line["split"] == split and line.get(curve.name) is not None
            ]
            if points:
                panel.plot(*zip(*points, strict=True), style, markersize=4, label=split)
        panel.set(title=curve.title, xlabel="step")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
