"""What becomes of the pictures of a unit: a file each, or one tar of all."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from pipelines.generation.layout import Format, Layout
from pipelines.generation.store import Store

QUALITY = 95  # of jpeg


class Sink(Protocol):
    def take(self, number: int, picture: Image.Image) -> None:
        """A sample of the unit, in any thread and in any order within a batch."""
        ...

    def flush(self) -> None:
        """After each batch."""
        ...


def encoded(picture: Image.Image, kind: Format, quality: int = QUALITY) -> bytes:
    """The bytes of an image file; only jpeg loses any of the pixels."""
    data = io.BytesIO()
    if kind == "jpeg":
        picture.save(data, format="JPEG", quality=quality, subsampling=0)
    elif kind == "webp":
        picture.save(data, format="WEBP", lossless=True)
    else:
        picture.save(data, format="PNG")
    return data.getvalue()


class FileSink:
    """A file for each picture, written at once, or a batch together where that is faster."""

    def __init__(self, store: Store, layout: Layout, quality: int) -> None:
        self.store, self.layout, self.quality = store, layout, quality
        self.waiting: dict[str, bytes] = {}

    def take(self, number: int, picture: Image.Image) -> None:
        data, name = encoded(picture, self.layout.format, self.quality), self.layout.path(number)
        if self.store.at_once:
            self.store.write(name, data)
        else:
            self.waiting[name] = data

    def flush(self) -> None:
        if self.waiting:
            self.store.write_many(self.waiting)
        self.waiting = {}


class TarSink:
    """`000000.png` and `000000.json` of each sample in turn, as webdataset reads them; the same samples make the same
    bytes. In memory is one batch."""

    def __init__(self, file: Path, layout: Layout, lines: Iterator[dict[str, Any]]) -> None:
        """lines: what the tar tells of each sample, in order."""
        self.layout, self.lines = layout, lines
        self.archive = tarfile.open(file, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.waiting: dict[int, bytes] = {}
        self.sizes: list[int] = []

    def take(self, number: int, picture: Image.Image) -> None:
        self.waiting[number] = encoded(picture, "png")

    def flush(self) -> None:
        for number in sorted(self.waiting):
            file, data = self.layout.file(number), self.waiting[number]
            self.add(file, data)
            about = json.dumps(next(self.lines), ensure_ascii=False) + "\n"
            self.add(file.replace(".png", ".json"), about.encode())
            self.sizes.append(len(data))
        self.waiting = {}

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # of time 0 and nobody's
        member.size = len(data)
        self.archive.addfile(member, io.BytesIO(data))


@contextmanager
def files_of_unit(store: Store, layout: Layout, quality: int) -> Iterator[FileSink]:
    sink = FileSink(store, layout, quality)
    yield sink
    sink.flush()


@contextmanager
def tar_of_unit(store: Store, layout: Layout, unit: range, lines: Iterator[dict[str, Any]]) -> Iterator[TarSink]:
    with store.writing(layout.tar(unit.start)) as temporary:
        sink = TarSink(temporary, layout, lines)
        try:
            yield sink
            sink.flush()
        finally:
            sink.archive.close()


def pictures_of(store: Store, layout: Layout, samples: Sequence[int]) -> Iterator[Image.Image]:
    """Samples that are there, one after another."""
    opened: dict[int, tarfile.TarFile] = {}  # the last tar
    try:
        for i in samples:
            if layout.format != "tar":
                data = store.read([layout.path(i)])[0]
            else:
                start = i - i % layout.per_shard
                if start not in opened:
                    for archive in opened.values():
                        archive.close()
                    archive = tarfile.open(fileobj=store.open(layout.tar(start)), mode="r")  # noqa: SIM115
                    opened = {start: archive}
                member = opened[start].extractfile(layout.file(i))
                assert member is not None
                data = member.read()
            with Image.open(io.BytesIO(data)) as image:
                yield image.copy()
    finally:
        for archive in opened.values():
            archive.close()
