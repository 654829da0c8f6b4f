"""Version 1 of the bytes of a `.zlg` file, which is only read (docs/format.md).

magic, version, flags │ what it was coded with │ shapes │ index of the images │ names │ payloads │ CRC-32
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.codec.contents import FINGERPRINT_BYTES, FLOATING, Archive, Entry, Environment, Mode, Shape
from pipelines.codec.fields import CHECKSUM_BYTES, Fields, WrongFieldError, bits_of

HAS_PRIOR, HAS_TABLES, HAS_NAMES = 1, 2, 4  # flags
MAX_LANES = 64  # of a prior's steps: a file cannot ask for more memory than this takes
DEVICES = ("cpu", "cuda", "mps", "other")


def archive_of(data: bytes) -> Archive:
    """What a file says whose checksum is right. It costs memory in proportion to the length of the file, whatever the
    file claims. Raises WrongFieldError."""
    fields = Fields(data[:-CHECKSUM_BYTES], position=5)
    length = len(fields.data)
    flags = fields.bytes(1)[0]
    if flags & ~(HAS_PRIOR | HAS_TABLES | HAS_NAMES):
        raise WrongFieldError(f"its flags are {flags}")
    stage1 = fields.bytes(FINGERPRINT_BYTES)
    prior = fields.bytes(FINGERPRINT_BYTES) if flags & HAS_PRIOR else None
    tables = fields.bytes(FINGERPRINT_BYTES) if flags & HAS_TABLES else None
    environment, lanes = None, 1
    if prior is not None:
        device, *torch = fields.bytes(3)
        if device >= len(DEVICES):
            raise WrongFieldError(f"its device is number {device}")
        environment = Environment(DEVICES[device], (torch[0], torch[1]))
        lanes = fields.number("lanes", 1, MAX_LANES)
    shapes = [fields.shape() for _ in range(fields.number("shapes", 1, length))]
    count = fields.number("images", 1, length)
    heads = [head_of(fields, shapes, prior is not None, tables is not None, lanes) for _ in range(count)]
    names = fields.names(count) if flags & HAS_NAMES else [""] * count
    payloads = payloads_of(fields.bytes(fields.left), [bits for _, bits in heads])
    entries = tuple(
        entry._replace(payload=payload, name=name)
        for (entry, _), payload, name in zip(heads, payloads, names, strict=True)
    )
    return Archive(entries, stage1, prior, tables, environment, lanes, version=1, arithmetic=FLOATING)


def head_of(
    fields: Fields, shapes: Sequence[Shape], has_prior: bool, has_tables: bool, lanes: int
) -> tuple[Entry, int]:
    """An entry without its payload, and how many bits that has."""
    kind = fields.number("shape and mode", 0, 4 * len(shapes) - 1)
    if kind & 3 not in set(Mode):
        raise WrongFieldError("it has an image in mode 3")
    mode, shape = Mode(kind & 3), shapes[kind >> 2]
    bits = fields.number("bits of an image", 0, 8 * len(fields.data))
    crc = int.from_bytes(fields.bytes(4), "little")
    if mode == Mode.packed and bits != shape.packed_bits:
        raise WrongFieldError(f"an image has {bits} bits, expected {shape.packed_bits} for its packed codes")
    if (mode == Mode.table and not has_tables) or (mode == Mode.prior and not has_prior):
        raise WrongFieldError(f"it does not name the {mode.name} of an image")
    if mode != Mode.prior:
        return Entry(mode, shape, crc, b""), bits
    label, lane = fields.number("label", 0, 1 << 31), fields.number("lane", 0, lanes - 1)
    return Entry(mode, shape, crc, b"", label - 1 if label else None, lane), bits


def payloads_of(data: bytes, bits: Sequence[int]) -> list[bytes]:
    """All that is left of the file, cut into so many bits for each image."""
    if len(data) != -(-sum(bits) // 8):
        raise WrongFieldError(f"its payloads have {len(data)} bytes, expected {-(-sum(bits) // 8)}")
    parts, done = [], 0
    for count in bits:
        parts.append(bits_of(data[done // 8 : -(-(done + count) // 8)], done % 8, count))
        done += count
    if done % 8 and data[-1] & ((1 << (8 - done % 8)) - 1):
        raise WrongFieldError("what fills its last byte is not zero")
    return parts
