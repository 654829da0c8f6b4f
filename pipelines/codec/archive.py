"""The bytes of a `.zlg` file, as docs/format.md lays them down. Knows nothing of models.

magic, version, flags │ what it was coded with │ shapes │ index of the images │ names │ payloads │ CRC-32
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import UserError
from pipelines.codec.entropy_coding import bit_length, packed_length

if TYPE_CHECKING:  # a file tells what it holds without torch, which takes seconds to import
    from torch import Tensor

    from codes.spec import Codes

SUFFIX = ".zlg"
MAGIC = b"\x89ZLG"
VERSION = 1
FINGERPRINT_BYTES = 8
HAS_PRIOR, HAS_TABLES, HAS_NAMES = 1, 2, 4  # flags
MAX_LANES = 64  # of a prior's steps: a file cannot ask for more memory than this takes
MAX_GRIDS = 256
MAX_SIDE = 1 << 31
DEVICES = ("cpu", "cuda", "mps", "other")


class Mode(IntEnum):
    packed = 0
    table = 1
    prior = 2


class Shape(NamedTuple):
    """What images of one size have in common."""

    height: int  # H of the image, before padding
    width: int  # W
    grids: tuple[tuple[int, int, int], ...]  # h, w, k of each

    @property
    def packed_bits(self) -> int:
        return sum(packed_length(h * w, k) for h, w, k in self.grids)


class Environment(NamedTuple):
    """Where a prior's probabilities were computed: another place may round them otherwise."""

    device: str  # one of DEVICES
    torch: tuple[int, int]  # major and minor version

    def __str__(self) -> str:
        return f"{self.device} with torch {self.torch[0]}.{self.torch[1]}"


class Entry(NamedTuple):
    """One image of a file."""

    mode: Mode
    shape: Shape
    crc: int  # `crc_of` its codes
    payload: bytes
    label: int | None = None  # class that the prior was told; None: none, or the null label
    lane: int = 0  # row of the batch of the prior's steps in which it was coded
    name: str = ""  # of the image in an archive

    @property
    def bits(self) -> int:
        """What the payload takes of a file: zeros at its end are known, of packed codes by their number."""
        return self.shape.packed_bits if self.mode == Mode.packed else bit_length(self.payload)


class Archive(NamedTuple):
    entries: tuple[Entry, ...]
    stage1: bytes  # first bytes of the fingerprint of the autoencoder
    prior: bytes | None = None  # likewise; None where no image was coded with one
    tables: bytes | None = None
    environment: Environment | None = None  # of the prior
    lanes: int = 1  # rows of a batch of the prior's steps


def crc_of(shape: Shape, codes: Codes) -> int:
    """CRC-32 of the codes of one image (1 h w each) and of the size and grids they go with: what a file must match."""
    numbers = [shape.height, shape.width, *(number for grid in shape.grids for number in grid)]
    crc = zlib.crc32(struct.pack(f"<{len(numbers)}Q", *numbers))
    for grid in codes:
        crc = zlib.crc32(as_array(grid).astype("<u8").tobytes(), crc)
    return crc


def as_array(grid: Tensor) -> np.ndarray:
    return grid.detach().cpu().numpy()


# ---- writing --------------------------------------------------------------------------------------------------------


def write_archive(archive: Archive) -> bytes:
    """The file. Parts that no image needs are left out."""
    modes = {entry.mode for entry in archive.entries}
    prior = archive.prior if Mode.prior in modes else None
    tables = archive.tables if Mode.table in modes else None
    named = any(entry.name for entry in archive.entries)
    names = "\0".join(entry.name for entry in archive.entries).encode(errors="surrogateescape") if named else b""
    flags = HAS_PRIOR * (prior is not None) + HAS_TABLES * (tables is not None) + HAS_NAMES * bool(names)
    shapes = {shape: number for number, shape in enumerate(dict.fromkeys(entry.shape for entry in archive.entries))}
    head = [MAGIC, bytes([VERSION, flags]), archive.stage1, prior or b"", tables or b""]
    if prior is not None:
        assert archive.environment is not None
        device, torch = archive.environment
        head += [bytes([DEVICES.index(device), *torch]), varint(archive.lanes)]
    head += [varint(len(shapes)), *map(shape_bytes, shapes), varint(len(archive.entries))]
    for entry in archive.entries:
        head += [varint(4 * shapes[entry.shape] + entry.mode), varint(entry.bits)]
        head.append(struct.pack("<I", entry.crc))
        if entry.mode == Mode.prior:
            head += [varint(0 if entry.label is None else entry.label + 1), varint(entry.lane)]
    if names:
        head += [varint(len(names)), names]
    data = b"".join([*head, *joined(archive.entries)])
    return data + struct.pack("<I", zlib.crc32(data))


def joined(entries: Sequence[Entry]) -> Iterator[bytes]:
    """All payloads, bit behind bit; zeros fill the last byte."""
    begun = np.empty(0, np.uint8)  # bits of a byte that is not full
    for entry in entries:
        bits = np.concatenate([begun, np.unpackbits(np.frombuffer(entry.payload, np.uint8))[: entry.bits]])
        full = len(bits) // 8 * 8
        begun = bits[full:]
        yield np.packbits(bits[:full]).tobytes()
    yield np.packbits(begun).tobytes()


def shape_bytes(shape: Shape) -> bytes:
    """Of each grid 4 h, plus 1 if it is square, plus 2 if its vocabulary is that of the grid before it."""
    parts, before = [varint(shape.height), varint(shape.width), varint(len(shape.grids))], 0
    for h, w, k in shape.grids:
        parts.append(varint(4 * h + (h == w) + 2 * (k == before)))
        parts += ([] if h == w else [varint(w)]) + ([] if k == before else [varint(k)])
        before = k
    return b"".join(parts)


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


# ---- reading --------------------------------------------------------------------------------------------------------


def read_archive(data: bytes, title: str = "the file") -> Archive:
    """What a file says, its checksum verified. It costs memory in proportion to the length of the file, whatever
    the file claims.

    title: how messages name it. Raises UserError for anything but a whole, sound file.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise UserError(f"{title} is no .zlg file: it does not begin as one; name a file that `zellige compress` wrote")
    if len(data) > 4 and data[4] != VERSION:
        raise UserError(
            f"{title} has version {data[4]} of the .zlg format, expected {VERSION}, which this program reads; "
            "take the program that wrote it"
        )
    if len(data) < 10 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise UserError(f"{title} is damaged or cut short: its checksum is wrong; copy it again from where it came")
    try:
        return Reader(data[:-4]).archive()
    except ValueError as error:
        raise UserError(f"{title} was edited or is from another program: {error}; compress the image anew") from error


class Reader:
    """Raises ValueError, with what is wrong."""

    def __init__(self, data: bytes):
        self.data = data
        self.position = len(MAGIC) + 1

    def archive(self) -> Archive:
        flags = self.bytes(1)[0]
        if flags & ~(HAS_PRIOR | HAS_TABLES | HAS_NAMES):
            raise ValueError(f"its flags are {flags}")
        stage1 = self.bytes(FINGERPRINT_BYTES)
        prior = self.bytes(FINGERPRINT_BYTES) if flags & HAS_PRIOR else None
        tables = self.bytes(FINGERPRINT_BYTES) if flags & HAS_TABLES else None
        environment, lanes = None, 1
        if prior is not None:
            device, *torch = self.bytes(3)
            if device >= len(DEVICES):
                raise ValueError(f"its device is number {device}")
            environment = Environment(DEVICES[device], (torch[0], torch[1]))
            lanes = self.number("lanes", 1, MAX_LANES)
        shapes = [self.shape() for _ in range(self.number("shapes", 1, len(self.data)))]
        count = self.number("images", 1, len(self.data))
        heads = [self.head(shapes, prior is not None, tables is not None, lanes) for _ in range(count)]
        names = [""] * count
        if flags & HAS_NAMES:
            length = self.number("bytes of names", 1, len(self.data))
            names = self.bytes(length).decode(errors="surrogateescape").split("\0")
            if len(names) != count:
                raise ValueError(f"it holds {len(names)} names for {count} images")
        payloads = self.payloads([bits for _, bits in heads])
        entries = tuple(
            entry._replace(payload=payload, name=name)
            for (entry, _), payload, name in zip(heads, payloads, names, strict=True)
        )
        return Archive(entries, stage1, prior, tables, environment, lanes)

    def shape(self) -> Shape:
        height, width = self.number("rows", 1, MAX_SIDE), self.number("columns", 1, MAX_SIDE)
        grids: list[tuple[int, int, int]] = []
        for _ in range(self.number("grids", 1, MAX_GRIDS)):
            first = self.number("rows of codes", 4, 4 * MAX_SIDE + 3)
            h = first >> 2
            w = h if first & 1 else self.number("columns of codes", 1, MAX_SIDE)
            if first & 2 and not grids:
                raise ValueError("its first grid has no vocabulary")
            grids.append((h, w, grids[-1][2] if first & 2 else self.number("codes of a vocabulary", 1, 1 << 62)))
        return Shape(height, width, tuple(grids))

    def head(self, shapes: Sequence[Shape], has_prior: bool, has_tables: bool, lanes: int) -> tuple[Entry, int]:
        """An entry without its payload, and how many bits that has."""
        kind = self.number("shape and mode", 0, 4 * len(shapes) - 1)
        if kind & 3 not in set(Mode):
            raise ValueError("it has an image in mode 3")
        mode, shape = Mode(kind & 3), shapes[kind >> 2]
        bits = self.number("bits of an image", 0, 8 * len(self.data))
        crc = int.from_bytes(self.bytes(4), "little")
        if mode == Mode.packed and bits != shape.packed_bits:
            raise ValueError(f"an image has {bits} bits, expected {shape.packed_bits} for its packed codes")
        if (mode == Mode.table and not has_tables) or (mode == Mode.prior and not has_prior):
            raise ValueError(f"it does not name the {mode.name} of an image")
        if mode != Mode.prior:
            return Entry(mode, shape, crc, b""), bits
        label, lane = self.number("label", 0, 1 << 31), self.number("lane", 0, lanes - 1)
        return Entry(mode, shape, crc, b"", label - 1 if label else None, lane), bits

    def payloads(self, bits: Sequence[int]) -> list[bytes]:
        """All that is left, cut into so many bits for each image."""
        left = self.data[self.position :]
        if len(left) != -(-sum(bits) // 8):
            raise ValueError(f"its payloads have {len(left)} bytes, expected {-(-sum(bits) // 8)}")
        parts, done = [], 0
        for count in bits:
            first, end = done // 8, -(-(done + count) // 8)
            own = np.unpackbits(np.frombuffer(left[first:end], np.uint8))[done % 8 :][:count]
            parts.append(np.packbits(own).tobytes())
            done += count
        if done % 8 and left[-1] & ((1 << (8 - done % 8)) - 1):
            raise ValueError("what fills its last byte is not zero")
        return parts

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError("it ends too early")
        part, self.position = self.data[self.position : end], end
        return part

    def number(self, what: str, smallest: int, largest: int) -> int:
        number = 0
        for place in range(0, 70, 7):
            byte = self.bytes(1)[0]
            number |= (byte & 127) << place
            if byte < 128:
                break
        else:
            raise ValueError(f"it claims {what} in more than ten bytes")
        if not smallest <= number <= largest:
            raise ValueError(f"it claims {what}: {number}, expected {smallest} to {largest}")
        return number


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises UserError where there is none."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path} is no file; name a {SUFFIX} file") from error
