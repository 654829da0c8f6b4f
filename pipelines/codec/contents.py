"""What a `.zlg` file holds, whatever the version of its bytes. Knows nothing of models."""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipelines.codec.entropy_coding import bit_length, packed_length

if TYPE_CHECKING:  # a file tells what it holds without torch, which takes seconds to import
    from torch import Tensor

    from codes.spec import Codes

FINGERPRINT_BYTES = 8
VERSION = 2  # of the format, as it is written
LOSSLESS = 3  # the version of files that hold images without loss (lossless_archive.py)
FLOATING, EXACT = 0, 1  # arithmetics of a prior: that of the machine in version 1, and "exact arithmetic 1"


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


class Entry(NamedTuple):
    """One image of a file."""

    mode: Mode
    shape: Shape
    crc: int  # `crc_of` its codes
    payload: bytes
    label: int | None = None  # class that the prior was told; None: none, or the null label
    lane: int = 0  # in version 1: row of the batch of the prior's steps in which it was coded
    name: str = ""  # of the image in an archive

    @property
    def bits(self) -> int:
        """What the payload takes of a file: zeros at its end are known, of packed codes by their number."""
        return self.shape.packed_bits if self.mode == Mode.packed else bit_length(self.payload)


class Environment(NamedTuple):
    """Where the probabilities of a prior of version 1 were computed: another place may round them otherwise."""

    device: str  # cpu, cuda, mps or other
    torch: tuple[int, int]  # major and minor version

    def __str__(self) -> str:
        return f"{self.device} with torch {self.torch[0]}.{self.torch[1]}"


class Archive(NamedTuple):
    entries: tuple[Entry, ...]
    stage1: bytes  # first bytes of the fingerprint of the autoencoder
    prior: bytes | None = None  # likewise; None where no image was coded with one
    tables: bytes | None = None
    environment: Environment | None = None  # of the prior, in version 1
    lanes: int = 1  # in version 1: rows of a batch of the prior's steps
    version: int = VERSION
    arithmetic: int = EXACT  # of the prior


def arithmetic_of(archive: Archive) -> str:
    """In words, how the probabilities of the prior are computed: exactly, the same on any machine, or not."""
    if archive.arithmetic == EXACT:
        return f"exact arithmetic {EXACT}"
    return f"arithmetic of the machine that wrote it, {archive.environment}"


def crc_of(shape: Shape, codes: Codes) -> int:
    """CRC-32 of the codes of one image (1 h w each) and of the size and grids they go with: what a file must match."""
    numbers = [shape.height, shape.width, *(number for grid in shape.grids for number in grid)]
    crc = zlib.crc32(struct.pack(f"<{len(numbers)}Q", *numbers))
    for grid in codes:
        crc = zlib.crc32(as_array(grid).astype("<u8").tobytes(), crc)
    return crc


def as_array(grid: Tensor) -> np.ndarray:
    return grid.detach().cpu().numpy()
