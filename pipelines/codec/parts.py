"""An archive that is being made: a small `.zlg` file for each batch, so that a kill costs no more than one of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.sources import Sources, times_of
from pipelines.codec.archive import VERSION, Archive, Entry, read_archive
from pipelines.codec.codec import Codec
from pipelines.folder_kinds import PARTS_NAME
from pipelines.pictures import quick_file


class Parts:
    """The images that an earlier run coded, as far as they are still what they were, and those of this one."""

    def __init__(self, out: Path, root: Path, codec: Codec, sources: Sources, process: int):
        """out: folder of the archive; root: of the images."""
        self.out, self.root, self.codec, self.sources, self.process = out, root, codec, sources, process
        self.entries: dict[str, Entry] = {}  # by the image's name
        self.written = 0

    def take_up(self, whole: Path | None = None) -> None:
        """Reads what an earlier run left. whole: an archive of the images as they are, but for some that could not be
        read."""
        if whole is not None and (archive := self.own_archive(whole)) is not None:
            self.entries |= {entry.name: entry for entry in archive.entries}
        for path in sorted((self.out / PARTS_NAME).glob("*.zlg")):
            self.written += path.name.startswith(f"{self.process}-")
            if (archive := self.own_archive(path)) is None:
                continue
            files = [self.root / entry.name for entry in archive.entries]
            if self.sources.is_current(self.name_of(path), files):
                self.entries |= {entry.name: entry for entry in archive.entries}

    def own_archive(self, path: Path) -> Archive | None:
        """What a file holds that this model wrote in this version; None for another, or one that is damaged."""
        try:
            archive = read_archive(path.read_bytes(), str(path))
        except UserError:  # damaged by a power failure
            return None
        return archive if archive.version == VERSION and self.codec.wrote(archive) else None

    def add(self, entries: Sequence[Entry], times: Sequence[str]) -> None:
        """Writes images that were coded together. times: `times_of` the file of each before it was read."""
        path = self.out / PARTS_NAME / f"{self.process}-{self.written:06}.zlg"
        with quick_file(path) as temporary:
            temporary.write_bytes(self.codec.archive(entries))
        files = [self.root / entry.name for entry in entries]
        unchanged = all(time == times_of([file]) for time, file in zip(times, files, strict=True))
        self.sources.add(self.name_of(path), files, None if unchanged else "")
        self.written += 1
        self.entries |= {entry.name: entry for entry in entries}

    def remove(self) -> None:
        """When the archive holds all of them. For one process, when all are done."""
        shutil.rmtree(self.out / PARTS_NAME, ignore_errors=True)
        self.sources.forget(f"{PARTS_NAME}/")

    def name_of(self, path: Path) -> str:
        return str(path.relative_to(self.out))
