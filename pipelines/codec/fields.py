"""Numbers, bytes, shapes and bits as they stand in `.zlg` files of every version (docs/format.md)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from pipelines.codec.contents import Entry, Shape

MAX_GRIDS = 256
MAX_SIDE = 1 << 31
MAX_VOCABULARY = 1 << 62
CHECKSUM_BYTES = 4


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def shape_bytes(shape: Shape) -> bytes:
    """Of each grid 4 h, plus 1 if it is square, plus 2 if its vocabulary is that of the grid before it."""
    parts, before = [varint(shape.height), varint(shape.width), varint(len(shape.grids))], 0
    for h, w, k in shape.grids:
        parts.append(varint(4 * h + (h == w) + 2 * (k == before)))
        parts += ([] if h == w else [varint(w)]) + ([] if k == before else [varint(k)])
        before = k
    return b"".join(parts)


def joined(entries: Sequence[Entry]) -> bytes:
    """All payloads, bit behind bit; zeros fill the last byte."""
    parts, begun = [], np.empty(0, np.uint8)  # bits of a byte that is not full
    for entry in entries:
        bits = np.concatenate([begun, np.unpackbits(np.frombuffer(entry.payload, np.uint8))[: entry.bits]])
        full = len(bits) // 8 * 8
        begun = bits[full:]
        parts.append(np.packbits(bits[:full]).tobytes())
    return b"".join([*parts, np.packbits(begun).tobytes()])


def bits_of(data: bytes, first: int, count: int) -> bytes:
    """So many bits from bit `first` on; zeros fill the last byte."""
    own = np.unpackbits(np.frombuffer(data, np.uint8))[first : first + count]
    return np.packbits(own).tobytes()


def checksum(data: bytes, place: bytes = b"") -> bytes:
    """place: what tells where the bytes stand, as if it stood before them."""
    return zlib.crc32(data, zlib.crc32(place)).to_bytes(CHECKSUM_BYTES, "little")


def is_sealed(data: bytes, place: bytes = b"") -> bool:
    """Whether bytes end with their checksum."""
    return len(data) >= CHECKSUM_BYTES and checksum(data[:-CHECKSUM_BYTES], place) == data[-CHECKSUM_BYTES:]


def place_of_page(number: int) -> bytes:
    """For its checksum, so that no page passes for another."""
    return number.to_bytes(8, "little")


class WrongFieldError(Exception):
    """What a file says that cannot be, to stand behind its name."""


class Fields:
    """Reads a part of a file from its beginning. Raises WrongFieldError."""

    def __init__(self, data: bytes, position: int = 0):
        self.data = data
        self.position = position

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self.data) - self.position

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise WrongFieldError("it ends too early")
        end = self.position + count
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
            raise WrongFieldError(f"it claims {what} in more than ten bytes")
        if not smallest <= number <= largest:
            raise WrongFieldError(f"it claims {what}: {number}, expected {smallest} to {largest}")
        return number

    def shape(self) -> Shape:
        height, width = self.number("rows", 1, MAX_SIDE), self.number("columns", 1, MAX_SIDE)
        grids: list[tuple[int, int, int]] = []
        for _ in range(self.number("grids", 1, MAX_GRIDS)):
            first = self.number("rows of codes", 4, 4 * MAX_SIDE + 3)
            h = first >> 2
            w = h if first & 1 else self.number("columns of codes", 1, MAX_SIDE)
            if first & 2 and not grids:
                raise WrongFieldError("its first grid has no vocabulary")
            grids.append((h, w, grids[-1][2] if first & 2 else self.number("codes of a vocabulary", 1, MAX_VOCABULARY)))
        return Shape(height, width, tuple(grids))

    def names(self, count: int) -> list[str]:
        names = self.bytes(self.number("bytes of names", 0, len(self.data))).decode(errors="surrogateescape")
        parts = names.split("\0")
        if len(parts) != count:
            raise WrongFieldError(f"it holds {len(parts)} names for {count} images")
        return parts
