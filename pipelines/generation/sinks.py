"""What becomes of the pictures of a unit: a file each, or one tar of all."""

from __future__ import annotations

import io
import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

from PIL import Image

from common.errors import UserError
from common.wording import one_line
from pipelines.generation.encoder import Form, Piece
from pipelines.generation.layout import Layout
from pipelines.generation.store import FolderStore, Store
from pipelines.generation.writers import Writers

PER_PIECE = 16  # pictures that a process is given at a time,
PIXELS = 2**20  # or fewer, of so many pixels in all


class Given(NamedTuple):
    """Pictures that writers work on."""

    numbers: list[int]
    files: Future[list[bytes]]  # their bytes, or none where the writers are to put them somewhere


class Sink:
    """The way of a unit's pictures to the writers, and of what these make of them to where it belongs."""

    def __init__(
        self,
        writers: Writers,
        form: Form,
        name: Callable[[int], str],
        *,
        folder: str | None = None,
        send: Callable[[Mapping[str, bytes]], None] | None = None,
        add: Callable[[int, bytes], None] | None = None,
    ) -> None:
        """name: of a sample's file. One of three says what becomes of it: the writers put it into `folder`, or `send`
        it with others, in threads of theirs, or it is given to `add`, samples of a batch in order and batch after
        batch."""
        self.writers, self.form, self.name, self.folder, self.send, self.add = writers, form, name, folder, send, add
        self.taken: list[tuple[int, Image.Image]] = []
        self.given: deque[Given] = deque()
        self.sizes: dict[int, int] = {}  # of those that were added, by number
        self.left_out: set[int] = set()

    def take(self, number: int, picture: Image.Image | None) -> None:
        """A sample of the unit, in any thread and in any order within a batch; None for one that cannot be made."""
        if picture is None:
            self.left_out.add(number)
        else:
            self.taken.append((number, picture))

    def flush(self) -> None:
        """After each batch. Raises what went wrong with an earlier one."""
        taken, self.taken = sorted(self.taken, key=lambda entry: entry[0]), []
        for some in in_pieces(taken):
            numbers, pictures = [number for number, _ in some], [picture for _, picture in some]
            piece = Piece(self.form, self.folder, [self.name(number) for number in numbers], pictures)
            self.given.append(Given(numbers, self.writers.give(piece, self.send)))
        while self.given and self.given[0].files.done():
            self.settle(self.given.popleft())

    def finish(self) -> None:
        """Waits until all is written. Raises what went wrong."""
        self.flush()
        while self.given:
            self.settle(self.given.popleft())

    def is_written(self) -> bool:
        """Whether `finish` would not wait."""
        return not self.taken and all(given.files.done() for given in self.given)

    def settle(self, given: Given) -> None:
        files = given.files.result()
        if self.add is not None:
            for number, data in zip(given.numbers, files, strict=True):
                self.add(number, data)
                self.sizes[number] = len(data)


def in_pieces(taken: list[tuple[int, Image.Image]]) -> Iterator[list[tuple[int, Image.Image]]]:
    some: list[tuple[int, Image.Image]] = []
    pixels = 0
    for number, picture in taken:
        pixels += picture.width * picture.height
        if some and (len(some) == PER_PIECE or pixels > PIXELS):
            yield some
            some, pixels = [], picture.width * picture.height
        some.append((number, picture))
    if some:
        yield some


@contextmanager
def files_of_unit(store: Store, layout: Layout, form: Form, writers: Writers) -> Iterator[Sink]:
    """A file for each picture. When it ends well they are all there."""
    if isinstance(store, FolderStore):
        sink = Sink(writers, form, layout.path, folder=str(store.folder))
    else:
        sink = Sink(writers, form, layout.path, send=store.write_many)
    yield sink
    sink.finish()


@contextmanager
def tar_of_unit(
    store: Store, layout: Layout, unit: range, lines: Iterator[dict[str, Any]], form: Form, writers: Writers
) -> Iterator[Sink]:
    """`000000.png` and `000000.json` of each sample in turn, as webdataset reads them; the same samples make the same
    bytes. The tar is there when this ends well, and else not. lines: what it tells of each sample, in order, those that
    are left out among them."""
    with (
        store.writing(layout.tar(unit.start)) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
    ):

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)  # of time 0 and nobody's
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        def add_sample(number: int, data: bytes) -> None:
            file = layout.file(number)
            add(file, data)
            about = next(line for line in lines if line["index"] == number)
            add(file.replace(".png", ".json"), (json.dumps(about, ensure_ascii=False) + "\n").encode())

        sink = Sink(writers, form, layout.file, add=add_sample)
        yield sink
        sink.finish()


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
