"""Where samples lie: numbered files, by thousands in folders of their own, or tars of a thousand each.

A *unit* is such a thousand. Batches begin anew in each and keep their size, and what lies beyond the unit is dropped:
so a sample depends on the model, the settings and its number alone, whoever makes which unit and whenever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from common.errors import UserError

PER_SHARD = 1000  # images
MOST_PER_SHARD = 10_000  # what file systems and people still list gladly
SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg", "tar": ".png"}  # of an image, in a tar too

PART = "part_"  # folders of files with names, which may lie in folders called by numbers themselves

Format = Literal["png", "webp", "jpeg", "tar"]


class Layout(NamedTuple):
    format: Format
    per_shard: int = PER_SHARD  # images of a unit
    flat: bool = False  # all files in one folder, as builds before there were units wrote them
    stems: Callable[[int], str] | None = None  # names of files without endings, None: numbers, as in tars in any case

    def unit(self, start: int, num: int) -> range:
        """The unit of this first number, of `num` samples."""
        return range(start, min(start + self.per_shard, num))

    def units(self, part: range, num: int) -> Iterator[range]:
        """Those of the samples `part`, which begins with one, of `num`."""
        for start in range(part.start, part.stop, self.per_shard):
            yield self.unit(start, num)

    def file(self, number: int) -> str:
        """The name of an image's file, without the folder of its unit."""
        stem = f"{number:06d}" if self.stems is None or self.format == "tar" else self.stems(number)
        return f"{stem}{SUFFIXES[self.format]}"

    def folder(self, start: int) -> str:
        """Where the images of the unit with this first number lie: the first ones in the folder itself."""
        if self.flat or start == 0 or self.format == "tar":
            return ""
        return f"{start:06d}" if self.stems is None else f"{PART}{start:06d}"

    def path(self, number: int) -> str:
        """Of an image's file, relative to the folder of results."""
        folder = self.folder(number - number % self.per_shard)
        return f"{folder}/{self.file(number)}" if folder else self.file(number)

    def tar(self, start: int) -> str:
        return f"{start:06d}.tar"

    def check_part(self, part: range, num: int) -> None:
        """Raises UserError unless a part of `num` samples is made of whole units."""
        said = f"range={part.start}:{part.stop}"
        if not 0 <= part.start < part.stop <= num:
            raise UserError(f"{said}, expected FIRST:END, within the {num} images asked for")
        if part.start % self.per_shard or (part.stop % self.per_shard and part.stop != num):
            unit = "tar" if self.format == "tar" else "folder"
            raise UserError(
                f"{said}, expected multiples of {self.per_shard}, the images of a {unit}, or {num}, the end, so that "
                "jobs of other ranges share none; --images_per_shard says how many of a new folder"
            )


def batches(unit: range, batch_size: int) -> list[range]:
    """Batches of a unit, all of one size: the last one may reach beyond it."""
    return [range(start, start + batch_size) for start in range(unit.start, unit.stop, batch_size)]
