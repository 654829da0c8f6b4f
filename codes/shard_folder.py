"""Folders of shards, of codes or of latents: checksummed safetensors files, mapped when they are read, and an index."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.file_names import is_plain
from common.files import atomic_file, json_value, read_json, sha256_of_file, write_json
from common.sealed_json import check_seal, sealed
from common.tensor_files import save_tensors
from common.wording import counted

INDEX_NAME = "index.json"
UNFINISHED_NAME = "unfinished"  # folder of what is known of the shards until all of them are written
PLACES = {"data.path", "data.validation_path", "data.download_folder"}  # of images, in an index's source
LARGEST_HEADER = 100_000_000  # bytes, of a safetensors file: as the library has it
NUMPY_TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64, "I32": np.int32, "F32": np.float32}

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Shard:
    """One file of codes or latents, in the folder of its index."""

    file: str
    split: Split
    images: int = 0
    sha256: str = ""

    def __post_init__(self) -> None:
        if not is_plain(self.file):
            raise TypeError(f"the shard {self.file!r} is no file of its folder")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What `index.json` says of a folder of shards, beside what the shards hold."""

    what: ClassVar[str]  # of which shards, in messages: "code"
    spec_name: ClassVar[str]  # the field that describes what one image has

    class_names: tuple[str, ...] | None  # None: the images have no classes
    stage1_fingerprint: str  # PretrainedModel.fingerprint() of the model that encoded them
    source: dict[str, Any]  # which images, and how they were encoded: JSON values
    shards: tuple[Shard, ...]

    def images(self, split: Split) -> int:
        return sum(shard.images for shard in self.shards if shard.split == split)

    def to_json(self) -> dict[str, Any]:
        images = {"train": self.images("train"), "validation": self.images("validation")}
        fields = asdict(self)
        spec = {self.spec_name: fields[self.spec_name]}
        return sealed({"zellige_version": version("zellige"), "images": images, **spec, **fields})

    @classmethod
    def from_json(cls, value: Mapping[str, Any], **own: Any) -> Self:
        """own: the fields of the subclass."""
        names = value["class_names"]
        return cls(
            class_names=None if names is None else tuple(names),
            stage1_fingerprint=value["stage1_fingerprint"],
            source=value["source"],
            shards=tuple(Shard(**shard) for shard in value["shards"]),
            **own,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises UserError when the file is missing, damaged or something else."""
        value = read_json(path)
        if other := next((name for name in value if name.endswith("_spec") and name != cls.spec_name), None):
            held = f"{other.removesuffix('_spec')} shards"
            raise UserError(f"{path.parent} holds {held}, expected {cls.what} shards; name another folder")
        check_seal(path, value, "delete it and run its `zellige encode` again, which encodes the images anew")
        try:
            return cls.from_json(value)
        except (KeyError, TypeError, UserError) as error:
            raise UserError(
                f"{path} is not an index of {cls.what} shards ({error!r}): encode the images anew"
            ) from error

    def differences(self, other: ShardIndex, defaults: Mapping[str, Any] | None = None) -> list[str]:
        """Names of what the two would not encode alike; how far they have come does not count, nor where the images
        lie: `train_images` and `validation_images` tell which they are. defaults: of what one of them may not name."""
        fields = (self.spec_name, "class_names", "stage1_fingerprint")
        found = [name for name in fields if getattr(self, name) != getattr(other, name)]
        mine, theirs = ({**(defaults or {}), **index.source} for index in (self, other))
        found += [key for key in mine | theirs if mine.get(key) != theirs.get(key) and key not in PLACES]
        plans = [[(shard.file, shard.split) for shard in index.shards] for index in (self, other)]
        return found if found or plans[0] == plans[1] else ["shards"]


Index = TypeVar("Index", bound=ShardIndex)


def planned_shards(what: str, splits: Sequence[Split]) -> tuple[Shard, ...]:
    """As many shards as there will be, before they are written. what: what their files are called."""
    return tuple(
        Shard(f"{what}-{number:05d}-of-{len(splits):05d}.safetensors", split) for number, split in enumerate(splits)
    )


def as_read(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """JSON values as they read in a file, to compare with one."""
    found: dict[str, Any] = json.loads(json.dumps(value or {}))
    return found


class ShardWriter(Generic[Index]):
    """Writes a folder of shards, by any process in any order, each whole or not at all; then the index.

    A shard that an interrupted writer left counts as written if its checksum is right.
    """

    def __init__(self, folder: str | Path, plan: Index, source_defaults: Mapping[str, Any] | None = None):
        """plan: the index with shards that are not written. source_defaults: what a folder stands for that does not
        name one of these.

        Raises UserError when the folder holds shards of anything else.
        """
        self.folder = Path(folder)
        self.plan = plan
        self.unfinished = self.folder / UNFINISHED_NAME
        self.indexed: tuple[Shard, ...] = ()  # of a folder that was complete before
        for place in (self.folder, self.unfinished):
            if (place / INDEX_NAME).exists():
                found = type(plan).read(place / INDEX_NAME)
                if differences := plan.differences(found, as_read(source_defaults)):
                    raise UserError(
                        f"{self.folder} holds other {plan.what}s than these (different: {', '.join(differences)}); "
                        "name another folder, or delete this one first"
                    )
                self.indexed = found.shards
                return
        write_json(self.unfinished / INDEX_NAME, plan.to_json())

    def written(self, number: int) -> Shard | None:
        """Shard `number` as the index will list it; None if it is not there with the right checksum."""
        record = self.record(number)
        if record.exists():
            try:
                shard = Shard(**read_json(record))
            except (UserError, TypeError):  # damaged by a power failure, edited, or of another version
                return None
        elif self.indexed:
            shard = self.indexed[number]
        else:
            return None
        path = self.folder / shard.file
        return shard if path.exists() and sha256_of_file(path) == shard.sha256 else None

    def write_tensors(self, number: int, tensors: Mapping[str, Tensor], labels: Tensor, names: Sequence[str]) -> None:
        """Writes shard `number`. tensors: b ... each; labels: b, -1 for none; names: b, the images. Raises UserError
        when the disk is full."""
        text = "\0".join(names).encode(errors="surrogateescape")
        held = {
            **tensors,
            "labels": labels.to(torch.int32),
            "names": torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()),
        }
        shard = self.plan.shards[number]
        with atomic_file(self.folder / shard.file) as temporary:
            save_tensors(held, temporary)
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

    def finish(self) -> Index:
        """Writes the index, which completes the folder. For one process, when all shards are written."""
        shards = [self.written(number) for number in range(len(self.plan.shards))]
        missing = [plan.file for plan, shard in zip(self.plan.shards, shards, strict=True) if shard is None]
        if missing:
            raise UserError(
                f"{self.folder} lacks {', '.join(missing)}, or they were damaged since they were written; "
                "run the same command again"
            )
        index = self.complete(replace(self.plan, shards=tuple(shard for shard in shards if shard is not None)))
        write_json(self.folder / INDEX_NAME, index.to_json())
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return index

    def complete(self, index: Index) -> Index:
        """The index of all shards, with what a folder of this kind has besides."""
        return index


class ShardDataset(Generic[Index]):
    """One split of a folder of shards, which stay on disk, mapped."""

    index_class: ClassVar[type[ShardIndex]]

    def __init__(self, folder: str | Path, split: Split = "train"):
        """Raises UserError when the folder is not complete or a file does not fit the index."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; name one that `zellige encode` has completed")
        if not (self.folder / INDEX_NAME).exists():
            state = "an unfinished encoding" if (self.folder / UNFINISHED_NAME).exists() else f"no {INDEX_NAME}"
            raise UserError(f"{folder} holds {state}: name a folder that `zellige encode` has completed")
        self.index: Index = self.index_class.read(self.folder / INDEX_NAME)  # type: ignore[assignment]
        self.class_names = self.index.class_names
        self.stage1_fingerprint = self.index.stage1_fingerprint
        self.split = split
        self.shards = [shard for shard in self.index.shards if shard.split == split]
        self.ends = np.cumsum([shard.images for shard in self.shards], dtype=np.int64)  # one past each shard's last
        self.maps = [self.map_shard(shard) for shard in self.shards]

    def __repr__(self) -> str:
        classes = [counted(self.num_classes, "class", "classes")] if self.num_classes else []
        said = [f"{counted(len(self), 'image')} of {self.split}", self.describe(), *classes]
        return f"{type(self).__name__}({str(self.folder)!r}, {', '.join(said)})"

    def describe(self) -> str:
        """One phrase on what there is of each image."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": None}  # pickled, a map would be its whole content

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, maps=[])
        self.maps = [self.map_shard(shard) for shard in self.shards]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def fingerprint(self) -> str:
        """SHA-256 over what the index says of both splits: equal for equal content, wherever it lies."""
        return hashlib.sha256(json.dumps(self.facts()).encode()).hexdigest()

    def facts(self) -> list[Any]:
        """What tells the content of the folder: JSON values."""
        shards = [(shard.split, shard.images, shard.sha256) for shard in self.index.shards]
        return [shards, self.class_names, self.stage1_fingerprint]

    @property
    def num_classes(self) -> int:
        """0 where the images have no classes."""
        return len(self.class_names or ())

    @property
    def labels(self) -> np.ndarray:
        """The class of every image, n int32, -1 for none."""
        return np.concatenate([np.empty(0, np.int32), *(tensors["labels"] for tensors in self.maps)])

    def rows(self, indices: Sequence[int], names: Sequence[str]) -> list[np.ndarray]:
        """The tensors of these names, `b ...` each, of images `indices`."""
        wanted = np.asarray(indices, dtype=np.int64)
        shard_of = np.searchsorted(self.ends, wanted, side="right")  # b
        found = [np.empty((len(wanted), *shape), dtype) for shape, dtype in map(self.content().__getitem__, names)]
        for number in np.unique(shard_of):
            here = shard_of == number
            rows = wanted[here] - (self.ends[number] - self.shards[number].images)
            for name, batch in zip(names, found, strict=True):
                batch[here] = self.maps[number][name][rows]
        return found

    def content(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """The tensors of one image, by name: their shapes, and the types in which they are read."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """The image file of each sample, relative to the folder that was encoded, or the image's number."""
        texts = [tensors["names"].tobytes() for tensors in self.maps if len(tensors["labels"])]
        return [name for text in texts for name in text.decode(errors="surrogateescape").split("\0")]

    def map_shard(self, shard: Shard) -> dict[str, np.ndarray]:
        """The shard's tensors. Raises UserError unless they are what the index promises."""
        expected = {name: (shard.images, *shape) for name, (shape, _) in self.content().items()}
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
        for shard in self.shards:
            if sha256_of_file(self.folder / shard.file) != shard.sha256:
                raise UserError(
                    f"{self.folder / shard.file} is damaged: its checksum is not that of {INDEX_NAME}; run "
                    "its `zellige encode` again: it replaces what is not whole"
                )


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only arrays on the mapped file: what is not used is not read.

    The format: 8 bytes that hold the length of a JSON header, the header, the data. Raises OSError,
    ValueError, KeyError or TypeError when the file is not that.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, path.stat().st_size - 8):
            raise ValueError(f"it claims a header of {length} bytes")
        header = json_value(file.read(length))
    data = np.memmap(path, mode="r", dtype=np.uint8)[8 + length :]
    return {
        name: data[slice(*entry["data_offsets"])].view(NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
