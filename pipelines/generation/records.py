"""What is there: a record of each unit that is complete, and the images of those that are not, one by one.

A unit's record is written when all its images are, and holds their sizes: it is flushed to the disk, they are not,
which would cost more than to make them. After a power cut the sizes tell which came to harm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import NamedTuple

from common.errors import UserError
from common.files import json_value
from pipelines.generation.layout import Layout
from pipelines.generation.store import Store
from pipelines.pictures import is_whole_png

RECORDS = ".units"  # folder of the records, one for each unit
PASSES = ".passes"  # folder of how many passes through the prior images took: timing decides that, no image does
AT_ONCE = 64  # files that are read together
LEFT_OUT = -1  # in place of the size of an image that cannot be made, as of a file that cannot be read
RECORD = re.compile(r"(\d+)-(\d+)\.json")


class Record(NamedTuple):
    """Of a unit, or of its first samples, where fewer were asked for."""

    sizes: list[int]  # of the images, in bytes, or LEFT_OUT
    tar: int | None = None  # bytes of the tar that they are in
    labels: list[int] | None = None  # of a stream, whose classes nothing else tells


def record_name(unit: range) -> str:
    return f"{RECORDS}/{unit.start:06d}-{unit.stop:06d}.json"


def write_record(store: Store, unit: range, record: Record) -> None:
    with store.writing(record_name(unit)) as temporary:
        temporary.write_text(
            json.dumps(
                {name: value for name, value in record._asdict().items() if value is not None}, separators=(",", ":")
            )
            + "\n",
            encoding="utf-8",
        )


def recorded_ends(store: Store) -> dict[int, int]:
    """Where each recorded unit ends, by its first sample."""
    ends: dict[int, int] = {}
    for name in store.names(RECORDS):
        if match := RECORD.fullmatch(name):
            start, end = int(match[1]), int(match[2])
            ends[start] = max(end, ends.get(start, 0))
    return ends


def with_records(store: Store, units: Iterable[range], ends: dict[int, int]) -> Iterator[tuple[range, Record | None]]:
    """Each unit and its record: None where there is none, or a damaged one, or one that goes in this moment."""
    remaining = iter(units)
    while some := list(islice(remaining, AT_ONCE)):
        known = [range(unit.start, ends[unit.start]) for unit in some if unit.start in ends]
        try:
            found = store.read([record_name(unit) for unit in known])
        except (OSError, UserError):
            found = []
        records = {unit.start: parsed(data, unit) for unit, data in zip(known, found, strict=False)}
        for unit in some:
            yield unit, records.get(unit.start)


def parsed(data: bytes, unit: range) -> Record | None:
    try:
        record = Record(**json_value(data))
    except (ValueError, TypeError):
        return None
    return record if len(record.sizes) == len(unit) else None


def missing_of(store: Store, layout: Layout, unit: range, record: Record | None, closely: bool) -> list[int]:
    """The samples of a unit that are not there, or not whole. closely: of a file of the recorded size this is asked
    too, not only of those without a record. Of a tar its size tells, in any case."""
    known = [] if record is None else record.sizes[: len(unit)]
    if layout.format == "tar":
        whole = record is not None and len(known) == len(unit) and tar_size(store, layout, unit) == record.tar
        return [] if whole else list(unit)
    sizes = sizes_of(store, layout, unit)
    expected = [*known, *[None] * (len(unit) - len(known))]
    missing = {
        i
        for i, size, right in zip(unit, sizes, expected, strict=True)
        if right != LEFT_OUT and (size < 1 or right not in (None, size))
    }
    unsure = [
        i
        for i, right in zip(unit, expected, strict=True)
        if i not in missing and right != LEFT_OUT and (closely or right is None)
    ]
    found = zip(unsure, are_whole(store, layout, unsure), strict=True)
    return sorted(missing.union(i for i, is_right in found if not is_right))


def passes_of(store: Store, unit: range) -> dict[int, int]:
    """How many passes through the prior the samples of a unit took, those of which it is recorded."""
    try:
        found = json_value(store.read([passes_name(unit)])[0])
        return {i: int(number) for i, number in zip(unit, found, strict=False) if number is not None}
    except (OSError, UserError, ValueError, TypeError):
        return {}


def write_passes(store: Store, unit: range, passes: Mapping[int, int]) -> None:
    store.write(passes_name(unit), json.dumps([passes.get(i) for i in unit], separators=(",", ":")).encode() + b"\n")


def passes_name(unit: range) -> str:
    return f"{PASSES}/{unit.start:06d}.json"


def tar_size(store: Store, layout: Layout, unit: range) -> int:
    """Bytes; -1 where there is none."""
    return store.sizes("", [layout.tar(unit.start)])[0]


def sizes_of(store: Store, layout: Layout, unit: range) -> list[int]:
    """Bytes of each file of a unit; -1 for those that are not there."""
    found: list[int] = []
    for folder, files in groupby((layout.path(i).rpartition("/") for i in unit), lambda path: path[0]):
        found += store.sizes(folder, [name for *_, name in files])
    return found


def are_whole(store: Store, layout: Layout, samples: Sequence[int]) -> list[bool]:
    """Whether files that are there end as whole ones do."""
    found: list[bool] = []
    for start in range(0, len(samples), AT_ONCE):
        names = [layout.path(i) for i in samples[start : start + AT_ONCE]]
        found += [is_whole(data, layout) for data in store.read(names)]
    return found


def is_whole(data: bytes, layout: Layout) -> bool:
    if layout.format == "jpeg":
        return data.endswith(b"\xff\xd9")
    if layout.format == "webp":  # its head tells its length
        return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 == len(data)
    return is_whole_png(data)
