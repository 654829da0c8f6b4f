"""Folders of code shards: checksummed safetensors files, mapped when they are read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from common.files import atomic_file, read_json, sha256_of_file, write_json
from common.tensor_files import load_tensors, save_tensors
from training.task import Batch

INDEX_NAME = "index.json"
LATENTS_NAME = "latents.safetensors"  # what of the autoencoder turns codes to latents, for priors that see latents
UNFINISHED_NAME = "unfinished"  # folder of what is known of the shards until all of them are written
CHUNK = 8192  # images that are looked at at a time
PLACES = {"data.path", "data.validation_path", "data.download_folder"}  # of images, in an index's source
NUMPY_TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64, "I32": np.int32}

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Shard:
    """One file of codes."""

    file: str
    split: Split
    images: int = 0
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class CodeIndex:
    """What `index.json` says of a folder of code shards."""

    code_spec: CodeSpec
    class_names: tuple[str, ...] | None  # None: the images have no classes
    stage1_fingerprint: str  # PretrainedModel.fingerprint() of the autoencoder
    source: dict[str, Any]  # which images, and how their codes were made: JSON values
    shards: tuple[Shard, ...]
    latents_sha256: str | None = None  # of LATENTS_NAME; None: there is none

    def images(self, split: Split) -> int:
        return sum(shard.images for shard in self.shards if shard.split == split)

    def to_json(self) -> dict[str, Any]:
        images = {"train": self.images("train"), "validation": self.images("validation")}
        return {"zellige_version": version("zellige"), "images": images, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises UserError when the file is missing, damaged or something else."""
        value = read_json(path)
        try:
            names = value["class_names"]
            return cls(
                code_spec=CodeSpec.from_json(value["code_spec"]),
                class_names=None if names is None else tuple(names),
                stage1_fingerprint=value["stage1_fingerprint"],
                source=value["source"],
                shards=tuple(Shard(**shard) for shard in value["shards"]),
                latents_sha256=value.get("latents_sha256"),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not an index of code shards ({error!r}): encode the images anew") from error

    def differences(self, other: CodeIndex, defaults: Mapping[str, Any] | None = None) -> list[str]:
        """Names of what the two would not encode alike; how far they have come does not count, nor where the images
        lie: `train_images` and `validation_images` tell which they are. defaults: of what one of them may not name."""
        fields = ("code_spec", "class_names", "stage1_fingerprint")
        found = [name for name in fields if getattr(self, name) != getattr(other, name)]
        mine, theirs = ({**(defaults or {}), **index.source} for index in (self, other))
        found += [key for key in mine | theirs if mine.get(key) != theirs.get(key) and key not in PLACES]
        plans = [[(shard.file, shard.split) for shard in index.shards] for index in (self, other)]
        return found if found or plans[0] == plans[1] else ["shards"]


class CodeShardWriter:
    """Writes a folder of code shards, by any process in any order, each whole or not at all; then the index.

    A shard that an interrupted writer left counts as written if its checksum is right.
    """

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
    ):
        """splits: what each shard is for, as many as there will be; source: see CodeIndex; source_defaults: what a
        folder stands for that does not name one of these; latents: tensors that a next-scale prior takes
        (stage2_prior/priors/scale_latents.py), None for codes of another kind.

        Raises UserError when the folder holds codes of anything else.
        """
        self.folder = Path(folder)
        self.latents = latents
        self.unfinished = self.folder / UNFINISHED_NAME
        files = [f"codes-{number:05d}-of-{len(splits):05d}.safetensors" for number in range(len(splits))]
        self.plan = CodeIndex(
            code_spec=code_spec,
            class_names=None if class_names is None else tuple(class_names),
            stage1_fingerprint=stage1_fingerprint,
            source=json.loads(json.dumps(source or {})),  # as it reads in a file, to compare with one
            shards=tuple(map(Shard, files, splits)),
        )
        defaults = json.loads(json.dumps(source_defaults or {}))
        self.indexed: tuple[Shard, ...] = ()  # of a folder that was complete before
        for place in (self.folder, self.unfinished):
            if (place / INDEX_NAME).exists():
                found = CodeIndex.read(place / INDEX_NAME)
                if differences := self.plan.differences(found, defaults):
                    raise UserError(
                        f"{self.folder} holds other codes than these (different: {', '.join(differences)}); "
                        "name another folder, or delete this one first"
                    )
                self.indexed = found.shards
                return
        write_json(self.unfinished / INDEX_NAME, self.plan.to_json())

    def written(self, number: int) -> Shard | None:
        """Shard `number` as the index will list it; None if it is not there with the right checksum."""
        record = self.record(number)
        if record.exists():
            shard = Shard(**read_json(record))
        elif self.indexed:
            shard = self.indexed[number]
        else:
            return None
        path = self.folder / shard.file
        return shard if path.exists() and sha256_of_file(path) == shard.sha256 else None

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
        tensors["labels"] = labels.to(torch.int32)
        text = "\0".join(names).encode(errors="surrogateescape")
        tensors["names"] = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
        shard = self.plan.shards[number]
        with atomic_file(self.folder / shard.file) as temporary:
            save_tensors(tensors, temporary)
            digest = sha256_of_file(temporary)
        write_json(self.record(number), asdict(replace(shard, images=len(labels), sha256=digest)))

    def reopen(self) -> None:
        """Before shards of a folder that was complete are made anew: until `finish` it is an unfinished encoding again,
        so that nobody reads new codes among old ones. What the index said of the others is kept. For one process."""
        if not (self.folder / INDEX_NAME).exists():
            return
        for number, shard in enumerate(self.indexed):
            if not self.record(number).exists():
                write_json(self.record(number), asdict(shard))
        write_json(self.unfinished / INDEX_NAME, self.plan.to_json())
        (self.folder / INDEX_NAME).unlink(missing_ok=True)

    def record(self, number: int) -> Path:
        return self.unfinished / f"{self.plan.shards[number].file}.json"

    def finish(self) -> CodeIndex:
        """Writes the index, which completes the folder. For one process, when all shards are written."""
        shards = [self.written(number) for number in range(len(self.plan.shards))]
        missing = [plan.file for plan, shard in zip(self.plan.shards, shards, strict=True) if shard is None]
        if missing:
            raise UserError(
                f"{self.folder} lacks {', '.join(missing)}, or they were damaged since they were written; "
                "run the same command again"
            )
        index = replace(self.plan, shards=tuple(shard for shard in shards if shard is not None))
        if self.latents is not None:
            with atomic_file(self.folder / LATENTS_NAME) as temporary:
                save_tensors(self.latents, temporary)
                index = replace(index, latents_sha256=sha256_of_file(temporary))
        write_json(self.folder / INDEX_NAME, index.to_json())
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return index


def smallest_type(vocabulary: int) -> torch.dtype:
    """The smallest unsigned type that holds codes in [0, vocabulary); int64 beyond 32 bits."""
    types = {2**8: torch.uint8, 2**16: torch.uint16, 2**32: torch.uint32}
    return next((dtype for size, dtype in types.items() if vocabulary <= size), torch.int64)


class CodeDataset:
    """training.task.Dataset over one split of a folder of code shards, which stay on disk, mapped.

    A batch is {"codes": tuple of int64 `b h w`, one per grid, "labels": int64 b, -1 without classes}.
    """

    def __init__(self, folder: str | Path, split: Split = "train"):
        """Raises UserError when the folder is not complete or a file does not fit the index."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; name one that `zellige encode` has completed")
        if not (self.folder / INDEX_NAME).exists():
            state = "an unfinished encoding" if (self.folder / UNFINISHED_NAME).exists() else f"no {INDEX_NAME}"
            raise UserError(f"{folder} holds {state}: name a folder that `zellige encode` has completed")
        self.index = CodeIndex.read(self.folder / INDEX_NAME)
        self.code_spec = self.index.code_spec
        self.class_names = self.index.class_names
        self.stage1_fingerprint = self.index.stage1_fingerprint
        self.shards = [shard for shard in self.index.shards if shard.split == split]
        self.ends = np.cumsum([shard.images for shard in self.shards], dtype=np.int64)  # one past each shard's last
        self.maps = [self.map_shard(shard) for shard in self.shards]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": None}  # pickled, a map would be its whole content

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, maps=[])
        self.maps = [self.map_shard(shard) for shard in self.shards]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def fingerprint(self) -> str:
        """SHA-256 over what the index says of the codes of both splits: equal for equal codes, wherever they lie."""
        shards = [(shard.split, shard.images, shard.sha256) for shard in self.index.shards]
        facts = [shards, self.class_names, self.stage1_fingerprint, self.index.latents_sha256]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def num_classes(self) -> int:
        """0 where the images have no classes."""
        return len(self.class_names or ())

    @property
    def labels(self) -> np.ndarray:
        """The class of every image, n int32, -1 for none."""
        return np.concatenate([np.empty(0, np.int32), *(tensors["labels"] for tensors in self.maps)])

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """Codes and labels of images `indices`. `draws` changes nothing: codes know no augmentation."""
        wanted = np.asarray(indices, dtype=np.int64)
        shard_of = np.searchsorted(self.ends, wanted, side="right")  # b
        codes = {f"codes.{g.name}": np.empty((len(wanted), g.height, g.width), np.int64) for g in self.code_spec.grids}
        labels = np.empty(len(wanted), np.int64)
        for number in np.unique(shard_of):
            here = shard_of == number
            rows = wanted[here] - (self.ends[number] - self.shards[number].images)
            for name, batch in {**codes, "labels": labels}.items():
                batch[here] = self.maps[number][name][rows]
        return {"codes": tuple(map(torch.from_numpy, codes.values())), "labels": torch.from_numpy(labels)}

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

    def names(self) -> list[str]:
        """The image file of each sample, relative to the folder that was encoded, or the image's number."""
        texts = [tensors["names"].tobytes() for tensors in self.maps if len(tensors["labels"])]
        return [name for text in texts for name in text.decode(errors="surrogateescape").split("\0")]

    def map_shard(self, shard: Shard) -> dict[str, np.ndarray]:
        """The shard's tensors. Raises UserError unless they are what the index promises."""
        expected: dict[str, tuple[int, ...]] = {"labels": (shard.images,)}
        expected |= {f"codes.{g.name}": (shard.images, g.height, g.width) for g in self.code_spec.grids}
        try:
            tensors = map_tensors(self.folder / shard.file)
            for name, shape in expected.items():
                if tensors[name].shape != shape:
                    raise ValueError(f"{name} has shape {tensors[name].shape}, expected {shape}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder / shard.file} is missing or damaged ({error}); run its `zellige encode` "
                "again: it replaces what is not whole"
            ) from error
        return tensors

    def verify(self) -> None:
        """Compares every file with its checksum in the index. Raises UserError that names a damaged one."""
        self.latents()
        for shard in self.shards:
            if sha256_of_file(self.folder / shard.file) != shard.sha256:
                raise UserError(
                    f"{self.folder / shard.file} is damaged: its checksum is not that of {INDEX_NAME}; run "
                    "its `zellige encode` again: it replaces what is not whole"
                )


def check_range(stored: np.ndarray, grid: Grid, folder: str | Path) -> None:
    """Raises UserError unless all codes are in the grid's vocabulary."""
    if stored.size and int(stored.max()) >= grid.vocabulary:
        raise UserError(
            f"{folder} holds code {stored.max()} in grid {grid.name!r}, expected 0 to {grid.vocabulary - 1}; encode "
            "the images anew"
        )


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only arrays on the mapped file: what is not used is not read.

    The format: 8 bytes that hold the length of a JSON header, the header, the data. Raises OSError,
    ValueError, KeyError or TypeError when the file is not that.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    data = np.memmap(path, mode="r", dtype=np.uint8)[8 + length :]
    return {
        name: data[slice(*entry["data_offsets"])].view(NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
