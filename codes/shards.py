"""Folders of code shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from codes.shard_folder import (
    INDEX_NAME,
    ShardDataset,
    ShardIndex,
    ShardWriter,
    Split,
    as_read,
    planned_shards,
)
from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from common.files import atomic_file, sha256_of_file
from common.tensor_files import load_tensors, save_tensors
from training.task import Batch

LATENTS_NAME = "latents.safetensors"  # what of the autoencoder turns codes to latents, for priors that see latents
CHUNK = 8192  # images that are looked at at a time


@dataclass(frozen=True, kw_only=True)
class CodeIndex(ShardIndex):
    """What `index.json` says of a folder of code shards."""

    what: ClassVar[str] = "code"
    spec_name: ClassVar[str] = "code_spec"

    code_spec: CodeSpec
    latents_sha256: str | None = None  # of LATENTS_NAME; None: there is none
    codes_are_bits: bool | None = None  # each bit of a code's number says something by itself; None: not recorded

    @classmethod
    def from_json(cls, value: Mapping[str, Any], **own: Any) -> Self:
        spec = CodeSpec.from_json(value["code_spec"])
        found = {name: value.get(name) for name in ("latents_sha256", "codes_are_bits")}
        return super().from_json(value, code_spec=spec, **found, **own)


class CodeShardWriter(ShardWriter[CodeIndex]):
    """Writes a folder of code shards."""

    def __init__(
        self,
        folder: str | Path,
        code_spec: CodeSpec,
        splits: Sequence[Split],
        *,
        class_names: Sequence[str] | None = None,
        stage1_fingerprint: str = "",
        source: Mapping[str, Any] | None = None,
        source_defaults: Mapping[str, Any] | None = None,
        latents: Mapping[str, Tensor] | None = None,
        codes_are_bits: bool | None = None,
    ):
        """splits: what each shard is for, as many as there will be; source: see CodeIndex; source_defaults: what a
        folder stands for that does not name one of these; latents: tensors that a next-scale prior takes
        (stage2_prior/priors/scale_latents.py), None for codes of another kind; codes_are_bits: see CodeIndex.

        Raises UserError when the folder holds codes of anything else.
        """
        self.latents = latents
        plan = CodeIndex(
            code_spec=code_spec,
            class_names=None if class_names is None else tuple(class_names),
            stage1_fingerprint=stage1_fingerprint,
            source=as_read(source),
            shards=planned_shards("codes", splits),
            codes_are_bits=codes_are_bits,
        )
        super().__init__(folder, plan, source_defaults)

    def write(self, number: int, codes: Codes, labels: Tensor, names: Sequence[str]) -> None:
        """Writes shard `number`. codes: one `b h w` per grid; labels: b, -1 for none; names: b, the images.

        Raises UserError when the codes do not fit the CodeSpec or the disk is full.
        """
        spec = self.plan.code_spec
        spec.check(codes)
        tensors = {
            f"codes.{grid.name}": tensor.to(smallest_type(grid.vocabulary))
            for tensor, grid in zip(codes, spec.grids, strict=True)
        }
        self.write_tensors(number, tensors, labels, names)

    def complete(self, index: CodeIndex) -> CodeIndex:
        if self.latents is None:
            return index
        with atomic_file(self.folder / LATENTS_NAME) as temporary:
            save_tensors(self.latents, temporary)
            return replace(index, latents_sha256=sha256_of_file(temporary))


def smallest_type(vocabulary: int) -> torch.dtype:
    """The smallest unsigned type that holds codes in [0, vocabulary); int64 beyond 32 bits."""
    types = {2**8: torch.uint8, 2**16: torch.uint16, 2**32: torch.uint32}
    return next((dtype for size, dtype in types.items() if vocabulary <= size), torch.int64)


class CodeDataset(ShardDataset[CodeIndex]):
    """training.task.Dataset over one split of a folder of code shards, which stay on disk, mapped.

    A batch is {"codes": tuple of int64 `b h w`, one per grid, "labels": int64 b, -1 without classes}.
    """

    index_class = CodeIndex

    @property
    def code_spec(self) -> CodeSpec:
        return self.index.code_spec

    def describe(self) -> str:
        return self.code_spec.describe()

    def facts(self) -> list[Any]:
        return [*super().facts(), self.index.latents_sha256]

    def content(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        grids = {f"codes.{grid.name}": ((grid.height, grid.width), np.int64) for grid in self.code_spec.grids}
        return {"labels": ((), np.int64), **grids}

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """Codes and labels of images `indices`. `draws` changes nothing: codes know no augmentation."""
        labels, *codes = map(torch.from_numpy, self.rows(indices, list(self.content())))
        return {"codes": tuple(codes), "labels": labels}

    def stored(self) -> Iterator[tuple[np.ndarray, ...]]:
        """The codes of all images as they are stored, up to `CHUNK` of them at a time: one `b h w` for each grid.
        Raises UserError for codes beyond a grid's vocabulary."""
        for tensors in self.maps:
            for start in range(0, len(tensors["labels"]), CHUNK):
                grids = self.code_spec.grids
                parts = tuple(tensors[f"codes.{grid.name}"][start : start + CHUNK] for grid in grids)
                for part, grid in zip(parts, grids, strict=True):
                    check_range(part, grid, self.folder)
                yield parts

    def counts(self) -> tuple[Tensor, ...]:
        """How often each code occurs, one `k` int64 for each grid. Raises UserError as `stored` does."""
        totals = [np.zeros(grid.vocabulary, np.int64) for grid in self.code_spec.grids]
        for parts in self.stored():
            for total, part in zip(totals, parts, strict=True):
                total += np.bincount(part.ravel().astype(np.int64), minlength=len(total))
        return tuple(map(torch.from_numpy, totals))

    def latents(self) -> dict[str, Tensor] | None:
        """What the autoencoder gave of itself beside the codes, None if nothing. Raises UserError if damaged."""
        if self.index.latents_sha256 is None:
            return None
        path = self.folder / LATENTS_NAME
        if not path.is_file() or sha256_of_file(path) != self.index.latents_sha256:
            raise UserError(
                f"{path} is missing or damaged: its checksum is not that of {INDEX_NAME}; run its `zellige encode` "
                "again: it replaces what is not whole"
            )
        return load_tensors(path)

    def verify(self) -> None:
        self.latents()
        super().verify()


def check_range(stored: np.ndarray, grid: Grid, folder: str | Path) -> None:
    """Raises UserError unless all codes are in the grid's vocabulary."""
    if stored.size and int(stored.max()) >= grid.vocabulary:
        raise UserError(
            f"{folder} holds code {stored.max()} in grid {grid.name!r}, expected 0 to {grid.vocabulary - 1}; encode "
            "the images anew"
        )
