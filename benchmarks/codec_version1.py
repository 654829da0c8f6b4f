"""Writes version 1 of the format, as builds before version 2 did: the fuzz and tests try its reader with it."""

from __future__ import annotations

import struct

from pipelines.codec.archive import MAGIC, Archive, Mode, sealed
from pipelines.codec.fields import joined, shape_bytes, varint
from pipelines.codec.version1 import DEVICES, HAS_NAMES, HAS_PRIOR, HAS_TABLES


def write_version1(archive: Archive) -> bytes:
    modes = {entry.mode for entry in archive.entries}
    prior = archive.prior if Mode.prior in modes else None
    tables = archive.tables if Mode.table in modes else None
    named = any(entry.name for entry in archive.entries)
    flags = HAS_PRIOR * (prior is not None) + HAS_TABLES * (tables is not None) + HAS_NAMES * named
    shapes = {shape: number for number, shape in enumerate(dict.fromkeys(entry.shape for entry in archive.entries))}
    parts = [MAGIC, bytes([1, flags]), archive.stage1, prior or b"", tables or b""]
    if prior is not None:
        assert archive.environment is not None
        device, torch = archive.environment
        parts += [bytes([DEVICES.index(device), *torch]), varint(archive.lanes)]
    parts += [varint(len(shapes)), *map(shape_bytes, shapes), varint(len(archive.entries))]
    for entry in archive.entries:
        parts += [varint(4 * shapes[entry.shape] + entry.mode), varint(entry.bits), struct.pack("<I", entry.crc)]
        if entry.mode == Mode.prior:
            parts += [varint(0 if entry.label is None else entry.label + 1), varint(entry.lane)]
    if named:
        names = "\0".join(entry.name for entry in archive.entries).encode(errors="surrogateescape")
        parts += [varint(len(names)), names]
    return sealed(b"".join([*parts, joined(archive.entries)]))
