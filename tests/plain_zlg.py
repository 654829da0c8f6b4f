"""A decoder of `.zlg` files of version 2, bytes to codes, written from docs/format.md with nothing but the standard
library: nothing of Zellige, and no numpy. It is slow and says little of what is wrong."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

PACKED, TABLE, PRIOR = 0, 1, 2
PAGE = 256
TOTAL = 1 << 24

Table = list[list[int]]  # contexts k


@dataclass
class Image:
    mode: int
    height: int
    width: int
    grids: list[tuple[int, int, int]]  # h, w, k
    bits: int
    crc: int
    label: int | None = None
    name: str = ""
    payload: bytes = b""  # its last byte filled with zeros

    @property
    def codes(self) -> int:
        return sum(h * w for h, w, _ in self.grids)


class Fields:
    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def bytes(self, count: int) -> bytes:
        self.position += count
        assert self.position <= len(self.data)
        return self.data[self.position - count : self.position]

    def varint(self) -> int:
        number, place = 0, 0
        while True:
            byte = self.bytes(1)[0]
            number |= (byte & 127) << place
            place += 7
            if byte < 128:
                return number


def check_crc(data: bytes, before: bytes = b"") -> None:
    assert struct.unpack("<I", data[-4:])[0] == zlib.crc32(before + data[:-4])


# ---- the file -------------------------------------------------------------------------------------------------------


def read_file(data: bytes) -> tuple[dict[str, bytes], list[Image]]:
    """What the file was coded with, and its images with their payloads."""
    check_crc(data)
    fields = Fields(data)
    assert fields.bytes(5) == b"\x89ZLG\x02"
    flags = fields.bytes(1)[0]
    end = fields.varint() + fields.position  # of the head
    check_crc(data[:end])
    needs = {"autoencoder": fields.bytes(8)}
    if flags & 1:
        needs["prior"] = fields.bytes(8)
        assert fields.varint() == 1
    if flags & 2:
        needs["tables"] = fields.bytes(8)
    count = fields.varint()
    images, place = [], end
    if count <= PAGE:
        images = read_page(fields, count, flags)
        read_payloads(images, data[end:])
    else:
        pages = [(fields.varint(), fields.varint()) for _ in range(-(-count // PAGE))]
        start = end + sum(index for index, _ in pages)  # of the payloads
        for number, (index, payloads) in enumerate(pages):
            check_crc(data[place : place + index], struct.pack("<Q", number))
            page = read_page(Fields(data[place : place + index]), min(PAGE, count - number * PAGE), flags)
            read_payloads(page, data[start : start + payloads])
            images += page
            place, start = place + index, start + payloads
    return needs, images


def read_page(fields: Fields, count: int, flags: int) -> list[Image]:
    shapes = []
    for _ in range(fields.varint()):
        height, width, grids = fields.varint(), fields.varint(), []
        for _ in range(fields.varint()):
            first = fields.varint()
            h = first >> 2
            w = h if first & 1 else fields.varint()
            grids.append((h, w, grids[-1][2] if first & 2 else fields.varint()))
        shapes.append((height, width, grids))
    images = []
    for _ in range(count):
        number = fields.varint()
        mode, (height, width, grids) = number & 3, shapes[number >> 2]
        bits = sum(h * w * width_of(k) for h, w, k in grids) if mode == PACKED else fields.varint()
        images.append(Image(mode, height, width, grids, bits, struct.unpack("<I", fields.bytes(4))[0]))
        if mode == PRIOR:
            label = fields.varint()
            images[-1].label = label - 1 if label else None
    if flags & 4:
        for image, name in zip(images, fields.bytes(fields.varint()).split(b"\0"), strict=True):
            image.name = name.decode()
    return images


def read_payloads(images: list[Image], data: bytes) -> None:
    done = 0
    for image in images:
        begin, done = done, done + image.bits
        first, last = begin // 8, -(-done // 8)
        number = int.from_bytes(data[first:last], "big") >> (8 * last - done) & (1 << image.bits) - 1
        size = -(-image.bits // 8)
        image.payload = (number << 8 * size - image.bits).to_bytes(size, "big")


def width_of(k: int) -> int:
    """Bits of a packed code: ceil(log2 k)."""
    return (k - 1).bit_length()


# ---- fingerprints ---------------------------------------------------------------------------------------------------

LEFT_OUT = {"cluster_sizes", "vector_sums", "steps_since_revival", "usage", "shares", "updates", "text_output"}
OF_ENCODING = {"encoder", "encoders", "to_latents", "conditioners", "project_in", "logits"}


def read_tensors(data: bytes) -> dict[str, tuple[list[int], list[int] | list[float]]]:
    """A `.safetensors` file of 4-byte floats and whole numbers: shape and values of each tensor."""
    length, tensors = struct.unpack("<Q", data[:8])[0], {}
    for name, facts in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            size, form = {"F32": (4, "f"), "I32": (4, "i"), "I64": (8, "q")}[facts["dtype"]]
            begin, end = (8 + length + offset for offset in facts["data_offsets"])
            tensors[name] = facts["shape"], list(struct.unpack(f"<{(end - begin) // size}{form}", data[begin:end]))
    return tensors


def model_fingerprint(said: str, weights: bytes, left_out: set[str] = LEFT_OUT) -> str:
    """said: the JSON text; weights: `model.safetensors`, of which all that counts is float32."""
    digest = hashlib.sha256(said.encode())
    for name, (shape, values) in sorted(read_tensors(weights).items()):
        if not left_out & set(name.split(".")):
            digest.update(f"{name} f4 {tuple(shape)}".encode() + struct.pack(f"<{len(values)}f", *values))
    return digest.hexdigest()[:16]


def tables_fingerprint(tables: bytes) -> str:
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(read_tensors(tables).items()):
        digest.update(f"{name} {tuple(shape)}".encode() + struct.pack(f"<{len(values)}i", *values))
    return digest.hexdigest()[:16]


# ---- the range coder ------------------------------------------------------------------------------------------------


class RangeDecoder:
    def __init__(self, payload: bytes):
        self.payload, self.position = payload, 0
        self.width = (1 << 64) - 1  # W
        self.value = self.word() << 32 | self.word()  # D

    def word(self) -> int:
        """The next 32 bits; zeros follow the end."""
        self.position += 4
        return int.from_bytes(self.payload[self.position - 4 : self.position].ljust(4, b"\0"), "big")

    def decode(self, frequencies: Sequence[int]) -> int:
        """The next code, of frequencies that sum to 2^24."""
        scale = self.width >> 24
        quantile = self.value // scale
        assert quantile < TOTAL
        code, below = 0, 0
        while below + frequencies[code] <= quantile:
            below += frequencies[code]
            code += 1
        self.value -= scale * below
        self.width = scale * frequencies[code]
        if self.width < 1 << 32:
            self.width <<= 32
            self.value = self.value << 32 | self.word()
        return code


def frequencies_of(numerators: Sequence[int]) -> list[int]:
    """Of a prior's codes: numerators of its softmax in units of 2^-30."""
    total, spread = sum(numerators), TOTAL - len(numerators)
    counts = [1 + numerator * spread // total for numerator in numerators]
    counts[numerators.index(max(numerators))] += TOTAL - sum(counts)
    return counts


# ---- payloads -------------------------------------------------------------------------------------------------------


def unpack(image: Image) -> list[int]:
    number, left, codes = int.from_bytes(image.payload, "big"), 8 * len(image.payload), []
    for h, w, k in image.grids:
        for _ in range(h * w):
            left -= width_of(k)
            codes.append(number >> left & (1 << width_of(k)) - 1)
            assert codes[-1] < k
    return codes


def read_tables(data: bytes) -> dict[str, Table]:
    """`tables.safetensors`: a table of each name."""
    return {
        name: [numbers[row * k : (row + 1) * k] for row in range(contexts)]
        for name, ((contexts, k), numbers) in read_tensors(data).items()
    }


def decode_with_tables(image: Image, tables: Mapping[str, Table], names: Sequence[str]) -> Iterator[int]:
    decoder = RangeDecoder(image.payload)
    for name, (h, w, k) in zip(names, image.grids, strict=True):
        alone, left, upper = (tables.get(f"{name}.{context}") for context in ("alone", "left", "upper"))
        codes: list[int] = []
        for place in range(h * w):
            rows = [alone[0]] if alone else []
            rows += [left[codes[-1] if place % w else k]] if left else []
            rows += [upper[codes[-w] if place >= w else k]] if upper else []
            codes.append(decoder.decode([sum(counts) for counts in zip(*rows, strict=True)]))
        yield from codes


def decode_with_prior(image: Image, frequencies: Callable[[list[int], int | None], Sequence[int]]) -> list[int]:
    """frequencies: of the next code, given those before it in the prior's order, and the class."""
    decoder, codes = RangeDecoder(image.payload), []
    while len(codes) < image.codes:
        codes.append(decoder.decode(frequencies(codes, image.label)))
    return codes


def check_codes(image: Image, codes: Sequence[int]) -> None:
    """codes: grid after grid in raster order."""
    numbers = [image.height, image.width, *(number for grid in image.grids for number in grid), *codes]
    assert zlib.crc32(struct.pack(f"<{len(numbers)}Q", *numbers)) == image.crc
