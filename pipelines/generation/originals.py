"""What the results of each unit were made of: files, which may change between two runs.

A unit's record is written before the first of its results, and what it tells counts as soon as that is there. A result
of a file that is another one now, or is another number of the folder, is made anew; one of a file that was copied or
touched is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.files import json_value
from common.sources import content_of, times_of
from pipelines.generation.layout import Layout
from pipelines.generation.records import RECORD, RECORDS
from pipelines.generation.store import Store

ORIGINALS = ".originals"  # folder of the records, one for each unit


class Original(NamedTuple):
    """Of one image, or one set of files that belong together."""

    name: str
    times: str  # SHA-256 over sizes and times: cheap to compare, but a copy has other times
    contents: str  # SHA-256 over bytes


class Originals:
    """The files that results are made of, and those that they were made of."""

    def __init__(
        self,
        store: Store,
        layout: Layout,
        of_each: int,
        count: int,
        name: Callable[[int], str],
        files: Callable[[int], Sequence[Path]],
    ) -> None:
        """of_each: results of one original; count: of originals; name, files: of one, by its number."""
        self.store, self.layout, self.of_each, self.count = store, layout, of_each, count
        self.name, self.files = name, files

    def stale(self, unit: range) -> list[int]:
        """The results of a unit that were made of something else, or nobody knows of what."""
        before = self.read(unit)
        now = [self.compared(i, before[place]) for place, i in enumerate(self.numbers(unit))]
        changed = {place for place, original in enumerate(now) if original is None}
        if not changed and now != before[: len(now)]:  # copied or touched, and the same
            self.write(unit, [*(original for original in now if original is not None), *before[len(now) :]])
        return [i for i in unit if (i - unit.start) // self.of_each in changed]

    def begin(self, unit: range) -> None:
        """Before the first result of a unit is made: those that are stale go, and what they are made of is recorded."""
        before = self.read(unit)
        now = [self.compared(i, before[place]) for place, i in enumerate(self.numbers(unit))]
        changed = {place for place, original in enumerate(now) if original is None}
        if not changed:
            return
        for record in self.store.names(RECORDS):  # it would vouch for what goes now
            if (match := RECORD.fullmatch(record)) and int(match[1]) == unit.start:
                self.store.remove(f"{RECORDS}/{record}")
        if self.layout.format != "tar":  # a tar without a record counts for nothing
            places = [self.layout.path(i) for i in unit if (i - unit.start) // self.of_each in changed]
            for folder in sorted({place.rpartition("/")[0] for place in places}):
                there = set(self.store.names(folder))
                for place in places:
                    if place.rpartition("/")[0] == folder and place.rpartition("/")[2] in there:
                        self.store.remove(place)
        self.write(unit, [original or self.original(i) for i, original in zip(self.numbers(unit), now, strict=True)])

    def are_those_recorded(self) -> bool:
        """Whether each result was made of the same bytes as now: the files have only moved."""
        units = self.layout.units(range(self.count * self.of_each), self.count * self.of_each)
        recorded = set(self.store.names(ORIGINALS))
        known = [unit for unit in units if record_name(unit) in recorded]
        return 0 < len(known) == len(recorded) and not any(self.stale(unit) for unit in known)

    def numbers(self, unit: range) -> range:
        """The originals of a unit."""
        return range(unit.start // self.of_each, min(-(-unit.stop // self.of_each), self.count))

    def compared(self, number: int, before: Original | None) -> Original | None:
        """What is recorded of an original, with its times as they are now; None where it is another one."""
        name = self.name(number)
        if before is None or before.name != name:
            return None
        files = self.files(number)
        if (times := times_of(files)) == before.times:
            return before
        return before._replace(times=times) if contents_of(files) == before.contents else None

    def original(self, number: int) -> Original:
        files = self.files(number)
        times = times_of(files)  # before it is read: what changes meanwhile has another time later
        return Original(self.name(number), times, contents_of(files))

    def read(self, unit: range) -> list[Original | None]:
        """What is recorded of a unit's originals, None for those of which nothing is."""
        none: list[Original | None] = [None] * len(self.numbers(unit))
        if self.store.sizes(ORIGINALS, [record_name(unit)])[0] < 0:
            return none
        data = self.store.read([f"{ORIGINALS}/{record_name(unit)}"])[0]
        try:
            return [*(Original(*map(str, entry)) for entry in json_value(data)), *none]
        except (ValueError, TypeError):  # damaged
            return none

    def write(self, unit: range, originals: Sequence[Original | None]) -> None:
        self.store.write(
            f"{ORIGINALS}/{record_name(unit)}",
            json.dumps([one for one in originals if one is not None], separators=(",", ":")).encode() + b"\n",
        )


def record_name(unit: range) -> str:
    return f"{unit.start:06d}.json"


def contents_of(files: Sequence[Path]) -> str:
    return hashlib.sha256(";".join(map(content_of, files)).encode()).hexdigest()[:32]
