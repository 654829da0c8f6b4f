"""The bytes of a `.zlg` file of images without loss, as docs/format.md lays them down: version 3.

magic, version, flags │ model, shape, places of segments │ CRC-32 │ of each segment facts, CRC-32 and stack │ CRC-32

A segment holds up to thousands of images on one stack of bits, of which the last is read first: so much must be read
for the first of them, and so far a damage reaches. Knows nothing of models, and needs no torch.
"""

from __future__ import annotations

import io
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import UserError
from pipelines.codec.archive import sealed
from pipelines.codec.contents import FINGERPRINT_BYTES, LOSSLESS
from pipelines.codec.fields import CHECKSUM_BYTES, MAX_SIDE, Fields, WrongFieldError, is_sealed, place_of_page, varint
from pipelines.codec.sealed_file import MAGIC, SUFFIX, SealedFile, opened

HAS_NAMES = 4  # flag
ARITHMETIC = 1  # "exact arithmetic 1"
SEGMENT = 4096  # images at most
LARGEST_GROUP = 64  # images
MOST_SEGMENTS = 1 << 32
MOST_BYTES = 1 << 60
NAME_BYTES = 4096  # of a name, at most
NAMES_BYTES = 1 << 27  # of all names of a file, which are deflated
WORD_BYTES = 4


class ImageShape(NamedTuple):
    height: int  # H
    width: int  # W
    channels: int  # c

    @property
    def numbers(self) -> int:
        return self.height * self.width * self.channels


class Group(NamedTuple):
    """Images that are coded together."""

    images: int
    paid: bool  # whether their latents were taken from the stack; nothing lies under the first images


class Chain(NamedTuple):
    """Groups of images one upon the other."""

    groups: tuple[Group, ...]  # in the order of the images
    first_bits: int  # that groups which are not paid would have got back from their latents
    stack: bytes  # words of 32 bits, little-endian; no zeros at its end


class Segment(NamedTuple):
    chain: Chain
    crcs: tuple[int, ...]  # of the pixels of each group
    bound_bits: int  # what these images take by the model's ELBO, as the writer found it
    names: tuple[str, ...]  # of the images; empty strings where they have none

    @property
    def images(self) -> int:
        return sum(group.images for group in self.chain.groups)

    @property
    def first_images(self) -> int:
        """That are not paid."""
        return sum(group.images for group in self.chain.groups if not group.paid)


class LosslessArchive(NamedTuple):
    model: bytes  # first bytes of the fingerprint
    shape: ImageShape  # of all images
    segments: tuple[Segment, ...]


def crc_of_pixels(shape: ImageShape, pixels: bytes) -> int:
    """CRC-32 of H, W and c as 64-bit numbers, and of the 8-bit pixels of images, c last: what a file must match."""
    return zlib.crc32(pixels, zlib.crc32(b"".join(number.to_bytes(8, "little") for number in shape)))


# ---- names ----------------------------------------------------------------------------------------------------------

LAST_NUMBER = re.compile("([^0-9]*)([0-9]{1,18})", re.DOTALL)  # of a name that is turned round


def following(name: str) -> str | None:
    """The name with its last number, of up to 18 digits, one higher, in as many digits; None where it has none."""
    if (found := LAST_NUMBER.match(name[::-1])) is None:
        return None
    after, number = found[1][::-1], found[2][::-1]
    before = name[: len(name) - found.end()]
    return f"{before}{int(number) + 1:0{len(number)}d}{after}"


def packed_names(names: Sequence[str]) -> bytes:
    """Joined by zero bytes, an empty one for what follows the name before, and deflated. Every image has a name."""
    assert all(names)
    told = [name if name != following(before) else "" for before, name in itertools.pairwise(["", *names])]
    return zlib.compress("\0".join(told).encode(errors="surrogateescape"), 9)


def unpacked_names(data: bytes, count: int) -> tuple[str, ...]:
    """Raises WrongFieldError."""
    inflater = zlib.decompressobj()
    try:
        told = inflater.decompress(data, count * NAME_BYTES).decode(errors="surrogateescape").split("\0")
    except zlib.error as error:
        raise WrongFieldError(f"its names cannot be inflated: {error}") from error
    if not inflater.eof or inflater.unused_data or len(told) != count:
        raise WrongFieldError(f"it does not hold names for {count} images")
    names: list[str] = []
    for name in told:
        if len(name) > NAME_BYTES:
            raise WrongFieldError(f"it holds a name of {len(name)} characters")
        names.append(name or (following(names[-1]) or "" if names else ""))
    return tuple(names)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_lossless(archive: LosslessArchive) -> bytes:
    """The file."""
    named = any(name for segment in archive.segments for name in segment.names)
    facts = [sealed(facts_of(segment, named), place_of_page(number)) for number, segment in enumerate(archive.segments)]
    head = [archive.model, varint(ARITHMETIC), *map(varint, archive.shape), varint(len(archive.segments))]
    for segment, own in zip(archive.segments, facts, strict=True):
        head += [varint(segment.images), varint(len(own)), varint(len(segment.chain.stack))]
    joined = b"".join(head)
    beginning = MAGIC + bytes([LOSSLESS, HAS_NAMES * named]) + varint(len(joined) + CHECKSUM_BYTES) + joined
    parts = [part for segment, own in zip(archive.segments, facts, strict=True) for part in (own, segment.chain.stack)]
    return sealed(b"".join([sealed(beginning), *parts]))


def facts_of(segment: Segment, named: bool) -> bytes:
    """What stands before a segment's stack, without its checksum."""
    runs = [(group, len(list(alike))) for group, alike in itertools.groupby(segment.chain.groups)]
    parts = [varint(len(runs))]
    for group, count in runs:
        parts += [varint(2 * group.images + group.paid), varint(count)]
    parts += [varint(segment.chain.first_bits), varint(segment.bound_bits)]
    parts += [crc.to_bytes(CHECKSUM_BYTES, "little") for crc in segment.crcs]
    if named:
        names = packed_names(segment.names)
        parts += [varint(len(names)), names]
    return b"".join(parts)


# ---- reading --------------------------------------------------------------------------------------------------------


def is_lossless(path: Path) -> bool:
    """Whether a file says that it holds images without loss."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC) + 1) == MAGIC + bytes([LOSSLESS])
    except OSError:
        return False


def open_lossless(source: Path | str | bytes, title: str | None = None) -> LosslessFile:
    """A file, or its bytes, of which only those are read that are asked for: to be used in a `with` statement.

    title: how messages name it; None: its path. Raises UserError where there is no such file, and for a head that is
    damaged.
    """
    return opened(LosslessFile, source, title)


def read_lossless(source: Path | str | bytes, title: str | None = None) -> LosslessArchive:
    """What a file says, its checksums verified. It costs memory in proportion to the length of the file, but for names,
    which are deflated. Raises UserError for anything but a whole, sound file."""
    with open_lossless(source, title) as file:
        file.check()
        return LosslessArchive(file.model, file.shape, tuple(file.segments()))


class Place(NamedTuple):
    """Where a segment is."""

    first: int  # number of its first image
    images: int
    facts: slice  # bytes of the file
    stack: slice


class LosslessFile(SealedFile):
    """An open file. count: its images. model, shape: as in `LosslessArchive`. Its methods raise UserError for what is
    damaged."""

    def __init__(self, file: BinaryIO | io.RawIOBase, title: str):
        super().__init__(file, title)
        self.places: list[Place] = []
        beginning = self.read_beginning()
        if beginning[len(MAGIC)] != LOSSLESS:
            raise UserError(f"{title} holds codes of images, expected images without loss; read it by Codec")
        try:
            self.read_head(beginning)
        except WrongFieldError as error:
            raise self.edited(error) from error

    def read_head(self, beginning: bytes) -> None:
        fields = Fields(beginning, len(MAGIC) + 1)
        flags = fields.bytes(1)[0]
        try:
            length = fields.number("bytes of its head", 1, self.length)
        except WrongFieldError as error:  # its checksum cannot be found
            raise self.damaged(str(error)) from error
        end = fields.position + length
        if end > len(beginning):
            beginning += self.read(len(beginning), min(end, self.length) - len(beginning))
        if end > self.length or not is_sealed(beginning[:end]):
            raise self.damaged("its checksum is wrong")
        if flags & ~HAS_NAMES:
            raise WrongFieldError(f"its flags are {flags}")
        self.has_names = bool(flags)
        fields.data = beginning[: end - CHECKSUM_BYTES]
        self.model = fields.bytes(FINGERPRINT_BYTES)
        fields.number("an arithmetic", ARITHMETIC, ARITHMETIC)
        sides = fields.number("rows", 1, MAX_SIDE), fields.number("columns", 1, MAX_SIDE)
        self.shape = ImageShape(*sides, fields.number("channels", 1, MAX_SIDE))
        first, position = 0, end
        for _ in range(fields.number("segments", 1, MOST_SEGMENTS)):
            images = fields.number("images of a segment", 1, SEGMENT)
            facts = fields.number("bytes of a segment's facts", CHECKSUM_BYTES + 1, MOST_BYTES)
            stack = fields.number("bytes of a stack", 1, MOST_BYTES)
            begin = position + facts
            self.places.append(Place(first, images, slice(position, begin), slice(begin, begin + stack)))
            first, position = first + images, begin + stack
        self.count = first
        if fields.left:
            raise WrongFieldError(f"{fields.left} bytes of its head have no meaning")
        if self.length != position + CHECKSUM_BYTES:
            raise self.damaged(f"it has {self.length} bytes, expected {position + CHECKSUM_BYTES}")

    def segment(self, number: int, with_stack: bool = True) -> Segment:
        """Segment `number`, counted from 0; its stack is held against nothing: the pixels have checksums."""
        place = self.places[number]
        data = self.read(place.facts.start, place.facts.stop - place.facts.start)
        if not is_sealed(data, place_of_page(number)):
            raise self.damaged(f"the checksum of its segment {number} is wrong")
        stack = self.read(place.stack.start, place.stack.stop - place.stack.start) if with_stack else b""
        try:
            if with_stack and stack[-1] == 0:
                raise WrongFieldError("a stack ends in zeros")
            return self.segment_of(Fields(data[:-CHECKSUM_BYTES]), place.images, stack)
        except WrongFieldError as error:
            raise self.edited(error) from error

    def segment_of(self, fields: Fields, images: int, stack: bytes) -> Segment:
        groups: list[Group] = []
        left = images
        for _ in range(fields.number("runs of groups", 1, images)):
            first = fields.number("images of a group", 2, 2 * LARGEST_GROUP + 1)
            group = Group(first >> 1, bool(first & 1))
            count = fields.number("groups of a run", 1, max(1, left // group.images))
            groups += [group] * count
            left -= count * group.images
        if left:
            raise WrongFieldError(f"its groups hold {images - left} images, expected {images}")
        first_bits = fields.number("bits that were not got back", 0, MOST_BYTES)
        bound_bits = fields.number("bits by the bound", 0, MOST_BYTES)
        crcs = tuple(int.from_bytes(fields.bytes(CHECKSUM_BYTES), "little") for _ in groups)
        names: tuple[str, ...] = ("",) * images
        if self.has_names:
            names = unpacked_names(fields.bytes(fields.number("bytes of names", 1, len(fields.data))), images)
        if fields.left:
            raise WrongFieldError(f"{fields.left} bytes of a segment have no meaning")
        return Segment(Chain(tuple(groups), first_bits, stack), crcs, bound_bits, names)

    def segments(self) -> Iterator[Segment]:
        return map(self.segment, range(len(self.places)))

    def names(self) -> Iterator[str]:
        """Of all images: of the file no stack is read."""
        total = 0
        for number in range(len(self.places)):
            names = self.segment(number, with_stack=False).names
            total += sum(map(len, names))
            if total > NAMES_BYTES:
                raise self.edited(f"its names have more than {NAMES_BYTES} characters")
            yield from names


__all__ = [
    "LARGEST_GROUP",
    "SEGMENT",
    "SUFFIX",
    "Chain",
    "Group",
    "ImageShape",
    "LosslessArchive",
    "LosslessFile",
    "Segment",
    "crc_of_pixels",
    "is_lossless",
    "open_lossless",
    "read_lossless",
    "write_lossless",
]
