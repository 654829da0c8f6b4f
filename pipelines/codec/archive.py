"""The bytes of a `.zlg` file, as docs/format.md lays them down: writing version 2, reading it and version 1.

magic, version, flags │ what it was coded with │ where the pages are │ CRC-32 │ pages of the index │ payloads │ CRC-32

A page tells of 256 images; the only one of a smaller file stands in the head. So any image is found by the head and one
page, each with a checksum of its own.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import UserError
from pipelines.codec import version1
from pipelines.codec.contents import (
    EXACT,
    FINGERPRINT_BYTES,
    LOSSLESS,
    VERSION,
    Archive,
    Entry,
    Environment,
    Mode,
    Shape,
    arithmetic_of,
    as_array,
    crc_of,
)
from pipelines.codec.fields import (
    CHECKSUM_BYTES,
    Fields,
    WrongFieldError,
    bits_of,
    checksum,
    is_sealed,
    joined,
    place_of_page,
    shape_bytes,
    varint,
)
from pipelines.codec.sealed_file import MAGIC, SUFFIX, SealedFile, opened, read_file
from pipelines.codec.version1 import DEVICES

__all__ = [
    "DEVICES",
    "FINGERPRINT_BYTES",
    "PAGE",
    "SUFFIX",
    "VERSION",
    "Archive",
    "ArchiveFile",
    "Entry",
    "Environment",
    "Mode",
    "Shape",
    "arithmetic_of",
    "as_array",
    "crc_of",
    "open_archive",
    "read_archive",
    "read_file",
    "write_archive",
]

HAS_PRIOR, HAS_TABLES, HAS_NAMES = 1, 2, 4  # flags
PAGE = 256  # images
MAX_IMAGES = 1 << 48
MAX_BITS = 1 << 60  # of a part: where it is more than the file has, the file is taken for cut short


# ---- writing --------------------------------------------------------------------------------------------------------


def write_archive(archive: Archive) -> bytes:
    """The file. Parts that no image needs are left out."""
    assert archive.version == VERSION
    modes = {entry.mode for entry in archive.entries}
    prior = archive.prior if Mode.prior in modes else None
    tables = archive.tables if Mode.table in modes else None
    named = any(entry.name for entry in archive.entries)
    pages = [archive.entries[start : start + PAGE] for start in range(0, len(archive.entries), PAGE)]
    indices, payloads = [index_bytes(page, named) for page in pages], [joined(page) for page in pages]
    parts = [archive.stage1]
    parts += [] if prior is None else [prior, varint(archive.arithmetic)]
    parts += [] if tables is None else [tables]
    parts.append(varint(len(archive.entries)))
    if len(pages) == 1:
        parts += indices
        indices = []
    else:
        indices = [sealed(index, place_of_page(number)) for number, index in enumerate(indices)]
        for index, payload in zip(indices, payloads, strict=True):
            parts += [varint(len(index)), varint(len(payload))]
    facts = b"".join(parts)
    flags = HAS_PRIOR * (prior is not None) + HAS_TABLES * (tables is not None) + HAS_NAMES * named
    head = MAGIC + bytes([VERSION, flags]) + varint(len(facts) + CHECKSUM_BYTES) + facts
    return sealed(b"".join([sealed(head), *indices, *payloads]))


def sealed(data: bytes, place: bytes = b"") -> bytes:
    return data + checksum(data, place)


def index_bytes(entries: Sequence[Entry], named: bool) -> bytes:
    """A page of the index, without its checksum."""
    shapes = {shape: number for number, shape in enumerate(dict.fromkeys(entry.shape for entry in entries))}
    parts = [varint(len(shapes)), *map(shape_bytes, shapes)]
    for entry in entries:
        parts.append(varint(4 * shapes[entry.shape] + entry.mode))
        parts += [] if entry.mode == Mode.packed else [varint(entry.bits)]
        parts.append(entry.crc.to_bytes(4, "little"))
        parts += [] if entry.mode != Mode.prior else [varint(0 if entry.label is None else entry.label + 1)]
    if named:
        names = "\0".join(entry.name for entry in entries).encode(errors="surrogateescape")
        parts += [varint(len(names)), names]
    return b"".join(parts)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_archive(data: bytes, title: str = "the file") -> Archive:
    """What a file says, its checksums verified. It costs memory in proportion to the length of the file, whatever the
    file claims.

    title: how messages name it. Raises UserError for anything but a whole, sound file.
    """
    with open_archive(data, title) as file:
        file.check()
        return file.head._replace(entries=tuple(file.entries()))


def open_archive(source: Path | str | bytes, title: str | None = None) -> ArchiveFile:
    """A file, or its bytes, of which only those are read that are asked for: to be used in a `with` statement.

    title: how messages name it; None: its path. Raises UserError where there is no such file, and for a head that is
    damaged.
    """
    return opened(ArchiveFile, source, title)


class Page(NamedTuple):
    """Images that stand side by side, and where their payloads are."""

    number: int
    entries: list[Entry]  # without their payloads
    begins: list[int]  # bits before each payload, and one number more: before the end
    start: int  # byte of the file at which the payloads begin


class ArchiveFile(SealedFile):
    """An open `.zlg` file.

    count: its images. head: what `Archive` tells of all of them, without entries. bytes_read: so far. Its methods raise
    UserError for what is damaged.
    """

    def __init__(self, file: BinaryIO | io.RawIOBase, title: str):
        super().__init__(file, title)
        self.old: Archive | None = None  # of version 1, whose only checksum is that of the whole file
        self.page: Page | None = None  # the last one that was read
        self.read_head()

    def read_head(self) -> None:
        beginning = self.read_beginning()
        version = beginning[len(MAGIC)]
        if version == LOSSLESS:
            raise UserError(
                f"{self.title} holds images without loss, and no codes (version {version} of the format); read it by "
                "`zellige decompress`, or LosslessCodec"
            )
        if version not in (1, VERSION):
            raise UserError(
                f"{self.title} has version {version} of the .zlg format, expected 1 to {LOSSLESS}, which this program "
                "reads; take the program that wrote it"
            )
        try:
            if version == 1:
                self.read_version1(beginning)
            else:
                self.read_version2(beginning)
        except WrongFieldError as error:
            raise self.edited(error) from error

    def read_version1(self, beginning: bytes) -> None:
        data = beginning + self.read(len(beginning), self.length - len(beginning))
        if not is_sealed(data):
            raise self.damaged("its checksum is wrong")
        self.old = version1.archive_of(data)
        self.head, self.count = self.old._replace(entries=()), len(self.old.entries)

    def read_version2(self, beginning: bytes) -> None:
        fields = Fields(beginning, len(MAGIC) + 1)
        self.flags = fields.bytes(1)[0]
        try:
            length = fields.number("bytes of its head", 1, self.length)
        except WrongFieldError as error:  # its checksum cannot be found
            raise self.damaged(str(error)) from error
        end = fields.position + length
        if end > len(beginning):
            beginning += self.read(len(beginning), min(end, self.length) - len(beginning))
        if end > self.length or not is_sealed(beginning[:end]):
            raise self.damaged("its checksum is wrong")
        if self.flags & ~(HAS_PRIOR | HAS_TABLES | HAS_NAMES):
            raise WrongFieldError(f"its flags are {self.flags}")
        fields.data = beginning[: end - CHECKSUM_BYTES]
        stage1 = fields.bytes(FINGERPRINT_BYTES)
        prior = fields.bytes(FINGERPRINT_BYTES) if self.flags & HAS_PRIOR else None
        if prior is not None:
            fields.number("an arithmetic of its prior", EXACT, EXACT)
        tables = fields.bytes(FINGERPRINT_BYTES) if self.flags & HAS_TABLES else None
        self.head = Archive((), stage1, prior, tables)
        self.count = fields.number("images", 1, MAX_IMAGES)
        self.find_pages(fields, end)

    def find_pages(self, fields: Fields, end: int) -> None:
        """Where they are; the only one is read here. end: of the head."""
        if self.count <= PAGE:
            self.page = self.page_of(0, fields, None, end)
            self.index_starts, self.payload_starts = [end], [end, end + -(-self.page.begins[-1] // 8)]
        else:
            sizes = []
            for _ in range(-(-self.count // PAGE)):
                index = fields.number("bytes of a page", CHECKSUM_BYTES + 1, MAX_BITS)
                sizes.append((index, fields.number("bytes of payloads", 0, MAX_BITS)))
            self.index_starts = running_sums(end, (index for index, _ in sizes))
            self.payload_starts = running_sums(self.index_starts[-1], (payload for _, payload in sizes))
        if fields.left:
            raise WrongFieldError(f"{fields.left} bytes of its head have no meaning")
        expected = self.payload_starts[-1] + CHECKSUM_BYTES
        if self.length != expected:
            raise self.damaged(f"it has {self.length} bytes, expected {expected}")

    def page_of(self, number: int, fields: Fields, payload_bytes: int | None, start: int) -> Page:
        """A page, of which nothing was read yet. payload_bytes: as many as there must be. Raises WrongFieldError."""
        count = min(PAGE, self.count - number * PAGE)
        shapes = [fields.shape() for _ in range(fields.number("shapes", 1, count))]
        entries, begins = [], [0]
        for _ in range(count):
            entry, bits = self.entry_of(fields, shapes)
            entries.append(entry)
            begins.append(begins[-1] + bits)
        if self.flags & HAS_NAMES:
            named = zip(entries, fields.names(count), strict=True)
            entries = [entry._replace(name=name) for entry, name in named]
        if payload_bytes not in (None, -(-begins[-1] // 8)):
            raise WrongFieldError(f"payloads have {payload_bytes} bytes, expected {-(-begins[-1] // 8)}")
        return Page(number, entries, begins, start)

    def entry_of(self, fields: Fields, shapes: Sequence[Shape]) -> tuple[Entry, int]:
        """An entry without its payload, and how many bits that has. Raises WrongFieldError."""
        kind = fields.number("shape and mode", 0, 4 * len(shapes) - 1)
        if kind & 3 not in set(Mode):
            raise WrongFieldError("it has an image in mode 3")
        mode, shape = Mode(kind & 3), shapes[kind >> 2]
        bits = shape.packed_bits if mode == Mode.packed else fields.number("bits of an image", 0, MAX_BITS)
        crc = int.from_bytes(fields.bytes(4), "little")
        if (mode == Mode.table and self.head.tables is None) or (mode == Mode.prior and self.head.prior is None):
            raise WrongFieldError(f"it does not name the {mode.name} of an image")
        label = fields.number("label", 0, 1 << 31) if mode == Mode.prior else 0
        return Entry(mode, shape, crc, b"", label - 1 if label else None), bits

    def page_at(self, number: int) -> Page:
        if self.page is None or self.page.number != number:
            begin, end = self.index_starts[number : number + 2]
            data = self.read(begin, end - begin)
            if not is_sealed(data, place_of_page(number)):
                raise self.damaged(f"the checksum of its page {number} is wrong")
            start, stop = self.payload_starts[number : number + 2]
            fields = Fields(data[:-CHECKSUM_BYTES])
            try:
                self.page = self.page_of(number, fields, stop - start, start)
                if fields.left:
                    raise WrongFieldError(f"{fields.left} bytes of its page {number} have no meaning")
            except WrongFieldError as error:
                raise self.edited(error) from error
        return self.page

    def entry(self, number: int) -> Entry:
        """Image `number`, counted from 0. Its payload is held against nothing but its length: the codes have a checksum
        of their own. Raises UserError for a number that the file does not have."""
        if not 0 <= number < self.count:
            raise UserError(f"{self.title} has no image {number}, expected 0 to {self.count - 1}")
        if self.old is not None:
            return self.old.entries[number]
        page, place = self.page_at(number // PAGE), number % PAGE
        begin, end = page.begins[place : place + 2]
        data = self.read(page.start + begin // 8, -(-end // 8) - begin // 8)
        if end == page.begins[-1] and end % 8 and data[-1] & ((1 << (8 - end % 8)) - 1):
            raise self.edited("what fills a last byte is not zero")
        return page.entries[place]._replace(payload=bits_of(data, begin % 8, end - begin))

    def entries(self, numbers: Iterable[int] | None = None) -> Iterator[Entry]:
        """Images by their numbers; None: all. Neighbours are read fastest one after the other."""
        return map(self.entry, range(self.count) if numbers is None else numbers)

    def names(self) -> Iterator[str]:
        """Of all images: of the file only the index is read."""
        if self.old is not None:
            yield from (entry.name for entry in self.old.entries)
            return
        for number in range(-(-self.count // PAGE)):
            yield from (entry.name for entry in self.page_at(number).entries)

    def check(self) -> None:
        """Holds the whole file against its checksum."""
        if self.old is None:  # else that was done
            super().check()


def running_sums(start: int, numbers: Iterable[int]) -> list[int]:
    sums = [start]
    for number in numbers:
        sums.append(sums[-1] + number)
    return sums
