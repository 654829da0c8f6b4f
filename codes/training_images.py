"""Which images a prior was trained on, as far as their codes tell: a short record that goes with the model, so that an
evaluation can say that its "test" images are none.

Images are the same when all their codes are, whatever their files are called by now. Of many images the smallest hashes
stand for all: a bottom-k sketch (Broder 1997), which finds the share of training images among others all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from codes.shards import CodeDataset
from common.errors import UserError

LARGEST = 65_536  # hashes that are kept: half a megabyte


def hashes_of(codes: Sequence[Tensor | np.ndarray]) -> np.ndarray:
    """A hash of each image, `b` uint64, of its codes, one `b h w` for each grid, whole numbers of any type."""
    rows = np.concatenate([np.asarray(grid).reshape(len(grid), -1).astype("<i8") for grid in codes], axis=1)
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


class TrainingImages(NamedTuple):
    """Hashes of training images by their codes."""

    hashes: np.ndarray  # m, uint64, rising: all of them, or the smallest `LARGEST`
    complete: bool  # whether they are all

    @classmethod
    def of(cls, codes: CodeDataset) -> Self:
        """Of all images of a split of code shards."""
        parts = [hashes_of(grids) for grids in codes.stored()]
        found = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
        return cls(found[:LARGEST], len(found) <= LARGEST)

    def among(self, hashes: np.ndarray) -> tuple[int, int]:
        """How many of these images, `b` uint64, are training images, and of how many that can be told: codes that
        several of them share tell no image from another, and of many training images not all are recorded."""
        alone, copies = np.unique(hashes, return_counts=True)
        alone = alone[copies == 1]
        within = alone if self.complete else alone[alone <= self.hashes[-1]]
        return int(np.isin(within, self.hashes).sum()), len(within)

    def tensors(self) -> dict[str, Tensor]:
        """As they lie in a file."""
        return {"hashes": torch.from_numpy(self.hashes.view(np.int64)), "complete": torch.tensor(self.complete)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`. Raises UserError for others."""
        try:
            return cls(tensors["hashes"].numpy().view(np.uint64), bool(tensors["complete"]))
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"a record of training images holds something else ({error}); delete its file") from error
