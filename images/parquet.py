"""Parquet files at an address as a source of images: any image at any time, from the row group that it lies in.

Before the first step only the ends of the files are read, and the column of classes. A row group is fetched when one of
its images is needed first, and kept on this machine's disk for all processes that need others of them, as long as there
is room. So which images a step sees is a function of the step, as with files; that steps which follow one another find
their images in few row groups is a matter of their order (training.data.BlockOrder).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cache import cache_folder, find_arrays, keep_arrays
from common.errors import UserError
from common.files import atomic_file
from common.processes import on_main_process, process_state
from common.wording import one_line
from images.contract import SourceSettings, check_labels
from images.encoded import EncodedImages
from images.files import BadImageError, is_readable
from images.tables import CAPTIONS
from images.tar_files import PATTERN, expand_braces, glob_url, is_url, looked_up, shared_folder, system_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KIND = "parquet"  # of caches of indexes
ROW_GROUPS = "row_groups"  # folder of row groups among the caches
FORMAT = 1  # of an index
ENDING = ".parquet"
OPEN = 256  # row groups that a process has open; they lie on the disk, not in memory
READERS = 8  # files whose ends are read at a time
FREE = 0.1  # of the disk: with less room the row groups that were not needed for longest go


class Columns(NamedTuple):
    image: str
    label: str | None
    caption: str | None


class Index(NamedTuple):
    """Of one file."""

    groups: np.ndarray  # g, int64: rows of each row group
    labels: np.ndarray  # n, int64, -1 where there is none, numbers of `names` where there are some
    names: np.ndarray  # classes, bytes; empty where they are numbers
    columns: np.ndarray  # 3, bytes: as `Columns`, "" for none


class File(NamedTuple):
    place: str
    name: str  # relative to the folder that all lie in
    size: int  # bytes
    mark: str  # another one when it has changed


class ParquetSource(EncodedImages):
    """The images of one column of several files, decoded when asked for."""

    def __init__(
        self, title: str, files: Sequence[File], indexes: Sequence[Index], *, max_pixels: int, jpeg_margin: float
    ) -> None:
        """Raises UserError for files whose columns or classes are not the same."""
        self.title = title
        self.parquet = files
        self.columns = Columns(*(name.decode() or None for name in indexes[0].columns.tolist()))  # type: ignore[arg-type]
        for file, index in zip(files, indexes, strict=True):
            if index.columns.tolist() != indexes[0].columns.tolist():
                raise UserError(
                    f"{file.place} has other columns than {files[0].place}; name the files of one set, or say which by "
                    "--data.image_field and --data.label_field"
                )
        groups = [index.groups for index in indexes]
        self.file_of = np.repeat(np.arange(len(files)), [len(one) for one in groups])  # of each block
        self.group_of = np.concatenate([np.arange(len(one)) for one in groups])
        rows = np.concatenate(groups)
        self.starts = np.cumsum([0, *rows])  # of each block among all images
        self.blocks = np.repeat(np.arange(len(rows)), rows)  # n, int64: the row group of each image
        self.max_pixels, self.jpeg_margin = max_pixels, jpeg_margin
        labels, names = joined_classes(indexes)
        known = labels if self.columns.label is not None and (labels >= 0).any() else None
        self.labels, self.class_names = check_labels(title, len(labels), known, names, lowest=-1)
        self.opened: OrderedDict[int, Any] = OrderedDict()  # tables of blocks, the last one used last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": OrderedDict()}

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int) -> str:
        block = int(self.blocks[index])
        first = self.starts[np.searchsorted(self.file_of, self.file_of[block])]
        return f"{self.parquet[self.file_of[block]].name}/{index - first:06d}"

    def location(self, index: int) -> str:
        return f"{self.title}/{self.name(index)}"

    def value(self, index: int, column: str) -> Any:
        block = int(self.blocks[index])
        if block not in self.opened:
            file, group = self.parquet[self.file_of[block]], int(self.group_of[block])
            rows = int(self.starts[block + 1] - self.starts[block])
            self.opened[block] = kept_or_fetched(file, group, rows, self.columns)
            while len(self.opened) > OPEN:
                self.opened.popitem(last=False)
        self.opened.move_to_end(block)
        return self.opened[block].column(column)[int(index - self.starts[block])].as_py()

    def content(self, index: int) -> io.BytesIO:
        """Raises BadImageError for a row without an image."""
        value = self.value(index, self.columns.image)
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            raise BadImageError("a row without an image")
        return io.BytesIO(value)

    def still_bad(self, location: str) -> bool:
        place, _, number = location.rpartition("/")
        for at, file in enumerate(self.parquet):
            if place == f"{self.title}/{file.name}" and number.isdecimal():
                index = int(self.starts[np.searchsorted(self.file_of, at)]) + int(number)
                try:
                    return index < len(self) and not is_readable(self.content(index), self.max_pixels)
                except BadImageError:
                    return True
        return False

    def caption(self, index: int) -> str | None:
        if self.columns.caption is None:
            return None
        value = self.value(index, self.columns.caption)
        return None if value is None else str(value).strip()

    def files(self, indices: Sequence[int]) -> list[Path]:
        return []

    def stored_size(self, index: int) -> int | None:
        return None

    def fingerprint(self) -> str:
        """Over names and sizes of files, their row groups, and classes."""
        digest = hashlib.sha256("\0".join(f"{file.name} {file.size}" for file in self.parquet).encode())
        digest.update(self.starts.tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


def joined_classes(indexes: Sequence[Index]) -> tuple[np.ndarray, list[str] | None]:
    """Labels of all files, numbered alike, and the names of classes. Files of a set of Hugging Face all tell all of
    their classes, others only those that they have."""
    own = [[os.fsdecode(name) for name in index.names.tolist()] for index in indexes]
    if not any(own):
        return np.concatenate([index.labels for index in indexes]), None
    names = own[0] if all(one == own[0] for one in own) else sorted({name for one in own for name in one})
    numbers = {name: number for number, name in enumerate(names)}
    parts = [
        np.array([*(numbers[name] for name in one), -1], dtype=np.int64)[index.labels]  # -1 stays -1
        for one, index in zip(own, indexes, strict=True)
    ]
    return np.concatenate(parts), names


def is_parquet_address(path: str) -> bool:
    return is_url(path) and ENDING in path.rpartition("/")[2]


def open_parquet(path: str, settings: SourceSettings) -> ParquetSource:
    """The images of the parquet files that an address, or a pattern of addresses, stands for. Raises UserError."""
    if find_spec("pyarrow") is None:
        raise UserError(f"data.path={path} is read by the package pyarrow, which is not there: pip install pyarrow")

    def look() -> tuple[list[File], list[Index]]:
        files = find_parquet(path)
        with ThreadPoolExecutor(READERS) as pool:
            return files, list(pool.map(partial(index_of, settings=settings), files))

    files, indexes = on_main_process(process_state(), look)
    if not sum(int(index.groups.sum()) for index in indexes):
        raise UserError(f"{path} has no rows, expected images")
    title = shared_folder([file.place for file in files])
    return ParquetSource(title, files, indexes, max_pixels=settings.max_pixels, jpeg_margin=settings.jpeg_margin)


def find_parquet(path: str) -> list[File]:
    places = [place for one in expand_braces(path) for place in (glob_url(one) if PATTERN.search(one) else [one])]
    if not places:
        raise UserError(f"data.path={path} fits no files; check the path, and the pattern if it is one")
    found = [(place, *looked_up(place)) for place in dict.fromkeys(places)]
    if missing := [place for place, size, _ in found if size is None]:
        raise UserError(f"{missing[0]} is not there, one of data.path={path}; check the address, or bring it")
    cut = len(shared_folder(places)) + 1
    return [File(place, place[cut:], size or 0, mark) for place, size, mark in found]


def index_of(file: File, settings: SourceSettings) -> Index:
    """The index that is kept, or a new one. Raises UserError."""
    key = f"{file.place}\n{settings.image_field}\n{settings.label_field}\n{FORMAT}"
    mark = np.frombuffer(file.mark.encode(), dtype=np.uint8)
    kept = None if settings.relist else find_arrays(KIND, key)
    if kept is not None and kept.keys() == {*Index._fields, "mark"} and np.array_equal(kept["mark"], mark):
        return Index(*(kept[name] for name in Index._fields))
    with opened(file) as parquet:
        index = make_index(file, parquet, settings)
    keep_arrays(KIND, key, {**index._asdict(), "mark": mark})
    return index


@contextmanager
def opened(file: File) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile. Raises UserError for what goes wrong with it, here or inside."""
    import pyarrow.parquet

    try:
        system, path = system_of(file.place)
        with system.open(path, "rb") as data, pyarrow.parquet.ParquetFile(data) as parquet:
            yield parquet
    except UserError:
        raise
    except Exception as error:  # each service has errors of its own
        raise UserError(
            f"{file.place} cannot be read ({one_line(error)}); check it, and the access: the same command continues"
        ) from error


def make_index(file: File, parquet: Any, settings: SourceSettings) -> Index:
    """Raises UserError where columns are not to be told."""
    schema = parquet.schema_arrow
    features = features_of(schema)
    columns = columns_of(file, schema, features, settings)
    groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    labels, names = np.full(sum(groups), -1, dtype=np.int64), list[str]()
    if columns.label is not None:
        values = parquet.read(columns=[columns.label]).column(columns.label).to_pylist()
        names = features.get(columns.label, {}).get("names") or []
        if not names and all(value is None or isinstance(value, str) for value in values):
            names = sorted({value for value in values if value is not None})
            numbers = {name: number for number, name in enumerate(names)}
            values = [None if value is None else numbers[value] for value in values]
        if not all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in values):
            raise UserError(
                f"the column {columns.label} of {file.place} is {schema.field(columns.label).type}, expected classes: "
                "numbers or names"
            )
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    return Index(
        np.array(groups, dtype=np.int64),
        labels,
        np.array([os.fsencode(name) for name in names]) if names else np.zeros(0, dtype="S1"),
        np.array([(name or "").encode() for name in columns]),
    )


def features_of(schema: Any) -> dict[str, Any]:
    """What `datasets` wrote of the columns; empty for files of others."""
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    return {}


def columns_of(file: File, schema: Any, features: dict[str, Any], settings: SourceSettings) -> Columns:
    """Raises UserError where they are not to be told."""
    pictures = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in schema.names]
    pictures = pictures or [field.name for field in schema if holds_bytes(field.type)]
    image = settings.image_field or (pictures[0] if len(pictures) == 1 else None)
    if image is None:
        said = f"the columns of images {', '.join(pictures)}" if pictures else f"only {', '.join(schema.names)}"
        raise UserError(f"{file.place} has {said}, expected one column of images: say which by --data.image_field")
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    label = settings.label_field or (classes[0] if len(classes) == 1 else None)
    for option, name in (("image_field", image), ("label_field", label)):
        if name is not None and name not in schema.names:
            raise UserError(
                f"{file.place} has no column {name}, expected data.{option} to be of {', '.join(schema.names)}"
            )
    if not holds_bytes(schema.field(image).type):
        raise UserError(
            f"the column {image} of {file.place} is {schema.field(image).type}, expected images: files as bytes"
        )
    caption = next((n for n in CAPTIONS if n in schema.names and "string" in str(schema.field(n).type)), None)
    return Columns(image, label, caption)


def holds_bytes(kind: Any) -> bool:
    """Of encoded files: bytes, or a struct with them."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def kept_or_fetched(file: File, group: int, rows: int, columns: Columns) -> Any:
    """The table of a row group, which lies on the disk; where that is full, in memory. Raises UserError."""
    said = f"{file.place}\n{file.mark}\n{columns.image}\n{columns.caption}\n{FORMAT}"
    folder = cache_folder(ROW_GROUPS) / hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    place = folder / f"{group:06d}.arrow"
    if (table := table_in(place, rows)) is not None:
        return table
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with alone(place.with_suffix(".lock")):
        if (table := table_in(place, rows)) is not None:  # another process has fetched it meanwhile
            return table
        wanted = [columns.image, *([columns.caption] if columns.caption is not None else [])]
        with opened(file) as parquet:
            table = parquet.read_row_group(group, columns=wanted).combine_chunks()
        if table.num_rows != rows:
            raise UserError(
                f"{file.place} has {table.num_rows} rows in a group that had {rows} when it was indexed: it was "
                "written anew since; give the same command again"
            )
        make_room(folder.parent, table.nbytes)
        with suppress(OSError, UserError), atomic_file(place) as temporary:
            write_table(temporary, table)
        kept = table_in(place, rows)
        return table if kept is None else kept


def table_in(place: Path, rows: int) -> Any:
    """What is kept; None where there is nothing, or something damaged."""
    import pyarrow

    try:
        os.utime(place)
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(place))).read_all()
    except (OSError, pyarrow.ArrowInvalid):
        return None
    return table if table.num_rows == rows else None


def write_table(place: Path, table: Any) -> None:
    import pyarrow

    with pyarrow.OSFile(str(place), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Inside, other processes of this machine that come for the same wait; where there are no locks, none waits."""
    try:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(file)


def make_room(folder: Path, size: int) -> None:
    """For so many bytes: row groups of all sets go, the one that was not needed for longest first."""
    with suppress(OSError):
        usage = shutil.disk_usage(folder)
        short = size + FREE * usage.total - usage.free
        if short <= 0:
            return
        files = [(path.stat(), path) for path in folder.glob("*/*.arrow")]
        for status, path in sorted(files, key=lambda entry: entry[0].st_mtime_ns):
            path.unlink(missing_ok=True)  # who has it open keeps it
            short -= status.st_size
            if short <= 0:
                return
