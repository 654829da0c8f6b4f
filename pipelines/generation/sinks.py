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

from common.errors import UserError
from common.wording import one_line
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
    """Samples that are there, one after another. Raises UserError for one that is damaged, or gone in the meantime."""
    opened: dict[int, tarfile.TarFile] = {}  # the last tar
    try:
        for i in samples:
            name = layout.path(i) if layout.format != "tar" else layout.tar(i - i % layout.per_shard)
            try:
                picture = picture_of(store, layout, i, opened)
            except UserError:
                raise
            except Exception as error:  # Pillow raises many kinds
                raise UserError(
                    f"{store.path(name)} is damaged or gone ({one_line(error, 100)}): delete it, and the same command "
                    "makes it again"
                ) from error
            yield picture
    finally:
        for archive in opened.values():
            archive.close()


def picture_of(store: Store, layout: Layout, number: int, opened: dict[int, tarfile.TarFile]) -> Image.Image:
    """opened: the tar that was read last, by its first sample; it stays open for those beside it."""
    if layout.format != "tar":
        data = store.read([layout.path(number)])[0]
    else:
        start = number - number % layout.per_shard
        if start not in opened:
            for other in list(opened):
                opened.pop(other).close()
            opened[start] = tarfile.open(fileobj=store.open(layout.tar(start)), mode="r")  # noqa: SIM115
        member = opened[start].extractfile(layout.file(number))
        assert member is not None
        data = member.read()
    with Image.open(io.BytesIO(data)) as image:
        return image.copy()
