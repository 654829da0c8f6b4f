"""What stands beside finished samples: a record of them all, a sheet of the first, an archive for evaluators.

Each is written whole, and is the same whoever writes it: the process that finds that nothing is missing any more.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.owned_folder import SHEET_NAME
from common.wording import counted
from pipelines.generation.encoder import Form, encoded
from pipelines.generation.layout import Layout
from pipelines.generation.plan import Plan
from pipelines.generation.records import LEFT_OUT, record_name, recorded_ends, with_records
from pipelines.generation.sinks import pictures_of
from pipelines.generation.store import Store
from pipelines.pictures import class_rows, contact_sheet, in_columns

SAMPLES_NAME = "samples.jsonl"
NPZ_NAME = "samples.npz"
SHEET_COLUMNS = 10
SHEET_IMAGES = 100  # on a sheet without class rows


def lines_in(store: Store) -> int:
    """How many samples the record of an earlier run names."""
    if store.sizes("", [SAMPLES_NAME])[0] < 0:
        return 0
    with store.open(SAMPLES_NAME) as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(2**20), b""))


def write_samples(store: Store, layout: Layout, plan: Plan) -> list[int]:
    """samples.jsonl: one line an image. What all have in common stands in settings.json. Returns those left out."""
    ends = recorded_ends(store)
    left_out: list[int] = []
    units = layout.units(range(plan.num), plan.num)
    with store.writing(SAMPLES_NAME) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for unit, record in with_records(store, units, ends):
            if record is None:
                raise UserError(f"{store.path(record_name(unit))} is damaged or gone; the same command makes it again")
            where: dict[str, Any] = {"tar": layout.tar(unit.start)} if layout.format == "tar" else {}
            for about, size in zip(plan.lines(unit), record.sizes, strict=False):
                i = about["index"]
                if size == LEFT_OUT:
                    left_out.append(i)
                    continue
                name = layout.file(i) if where else layout.path(i)
                line = {"file": name, **where, **about, "bytes": size}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return left_out


def write_sheet(store: Store, layout: Layout, plan: Plan, turns: int) -> None:
    """sheet.png: the first images on one page; a row for each class where so many classes take turns."""
    first = plan.labels(range(min(plan.num, SHEET_COLUMNS * turns))) if turns else None
    if first is None or plan.num < 2 * len(set(first)):
        pictures = list(pictures_of(store, layout, range(min(plan.num, SHEET_IMAGES))))
        sheet = contact_sheet(in_columns(pictures, SHEET_COLUMNS))
    else:
        rows = class_rows(first, SHEET_COLUMNS)
        shown = sorted(i for row in rows for i in row)
        found = dict(zip(shown, pictures_of(store, layout, shown), strict=True))
        names = [plan.class_names[first[row[0]]] if plan.class_names else str(first[row[0]]) for row in rows]
        sheet = contact_sheet([[found[i] for i in row] for row in rows], names)
    store.write(SHEET_NAME, encoded(sheet, Form("png")))


def write_npz(store: Store, layout: Layout, samples: Sequence[int], labels: Sequence[int] | None) -> None:
    """samples.npz, of n images of a folder, as the evaluator of ADM reads it (Dhariwal and Nichol 2021,
    arXiv:2105.05233): `arr_0`, uint8 n H W 3, grey images with three equal channels, since it takes no others, and
    `arr_1`, int64 n, the classes where there are any. One image is in memory at a time, and the same images make the
    same file."""
    pictures = pictures_of(store, layout, samples)
    first = np.asarray(next(pictures).convert("RGB"))
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), *first.shape)}
    with store.writing(NPZ_NAME) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(first.tobytes())
            for picture in pictures:
                file.write(np.asarray(picture.convert("RGB")).tobytes())
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, np.array(labels, dtype=np.int64))


def images_in_npz(store: Store) -> int | None:
    """How many samples.npz holds; None where there is none that can be read."""
    try:
        with store.open(NPZ_NAME) as data, zipfile.ZipFile(data) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            return int(np.lib.format.read_array_header_1_0(file)[0][0])
    except (OSError, UserError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def summary(store: Store, num: int, made: int, *, as_npz: bool) -> str:
    """One line that says what was made and where; made: how many of the images are new."""
    archive = f", all in {store.path(NPZ_NAME)}" if as_npz else ""
    return (
        f"{counted(num, 'image')} in {store.title}, {made} of them new{archive}; the first are on "
        f"{store.path(SHEET_NAME)}, all of them in {store.path(SAMPLES_NAME)}"
    )
