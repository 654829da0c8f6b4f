"""Data sets of Hugging Face as a source of images: those of the hub, what `save_to_disk` wrote, parquet files.

The package `datasets` brings all of them into Arrow files on this machine, once, and reads rows from there at random:
so which images a step sees is a function of the step, as with files. A set of the hub is fetched whole before the first
step; rows that stream past in their own order are no source for this.
"""

from __future__ import annotations

import glob
import hashlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from common.errors import UserError
from common.processes import process_state
from images.contract import SourceSettings, check_labels
from images.encoded import EncodedImages
from images.files import BadImageError, File, is_readable
from images.tar_files import is_url

PREFIX = "hf:"
SAVED = ("dataset_dict.json", "state.json")  # in folders that `save_to_disk` wrote
ASKED = ("split", "config", "revision")  # behind a name: hf:NAME?split=validation&config=full_size
CAPTIONS = ("caption", "text")  # columns


class TableSource(EncodedImages):
    """The images of one column of a data set, decoded when asked for."""

    def __init__(
        self,
        title: str,
        rows: Any,
        column: str,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        caption_column: str | None = None,
        *,
        max_pixels: int,
        jpeg_margin: float,
    ):
        """rows: a datasets.Dataset; column: of images, as bytes, or as structs of bytes and path."""
        self.title = title
        self.rows = rows.select_columns([column])
        self.column = column
        self.words = None if caption_column is None else rows.select_columns([caption_column])
        self.caption_column = caption_column
        self.max_pixels = max_pixels
        self.jpeg_margin = jpeg_margin
        self.labels, self.class_names = check_labels(title, len(rows), labels, class_names, lowest=-1)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{index:06d}"

    def location(self, index: int) -> str:
        return f"{self.title}/{self.name(index)}"

    def content(self, index: int) -> File:
        """The image's file, or its bytes. Raises BadImageError where there is neither."""
        value = self.rows[index][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return io.BytesIO(value)
        if not isinstance(value, str) or not value:
            raise BadImageError("a row without an image")
        return value

    def still_bad(self, location: str) -> bool:
        place, _, number = location.rpartition("/")
        if place != self.title or not number.isdecimal() or int(number) >= len(self):
            return False
        try:
            return not is_readable(self.content(int(number)), self.max_pixels)
        except BadImageError:
            return True

    def caption(self, index: int) -> str | None:
        if self.words is None:
            return None
        value = self.words[index][self.caption_column]
        return None if value is None else str(value).strip()

    def files(self, indices: Sequence[int]) -> list[Path]:
        return []

    def stored_size(self, index: int) -> int | None:
        return None

    def fingerprint(self) -> str:
        """Over classes, and the length in bytes of every image: the same wherever the set lies."""
        digest = hashlib.sha256(f"{len(self)} ".encode())
        digest.update(lengths_of(self.rows, self.column).tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


def is_table(path: str) -> bool:
    """Whether a path names a data set that `datasets` reads: none at an address."""
    if is_url(path):
        return False
    place = Path(path).expanduser()
    return path.startswith(PREFIX) or path.endswith(".parquet") or any((place / name).is_file() for name in SAVED)


def open_table(path: str, split: str, settings: SourceSettings) -> TableSource:
    """The images of a data set: `hf:NAME` or `hf:FOLDER`, a folder of `save_to_disk`, parquet files or a pattern of
    such, or a folder of them. `?split=` behind a name goes before `split`. Raises UserError."""
    if find_spec("datasets") is None:
        raise UserError(f"data.path={path} is read by the package datasets, which is not there: pip install datasets")
    name, _, query = path.removeprefix(PREFIX).partition("?")
    asked = dict(parse_qsl(query)) if path.startswith(PREFIX) else {}
    if unknown := sorted(set(asked) - set(ASKED)):
        raise UserError(f"data.path={path} asks for {', '.join(unknown)}, expected {', '.join(ASKED)}")
    state = process_state()
    # The first process of all fetches, then the first of each further machine, which may not see its files.
    with state.main_process_first(), state.local_main_process_first():
        parts = load(path, name, asked)
    part = asked.get("split", split)
    if part not in parts:
        raise UserError(
            f"data.path={path} has the parts {', '.join(parts)} and none called {part}: name one, such as "
            f"{PREFIX}{name}?split={next(iter(parts))}"
        )
    return from_rows(f"{PREFIX}{name}?split={part}", parts[part], settings)


def load(path: str, name: str, asked: dict[str, str]) -> dict[str, Any]:
    """The parts of a data set by name. Raises UserError with the package's own reason."""
    import datasets

    place = Path(name).expanduser()
    try:
        if any((place / saved).is_file() for saved in SAVED):
            found: Any = datasets.load_from_disk(str(place))
        elif name.endswith(".parquet") or (place.is_dir() and not path.startswith(PREFIX)):
            files = sorted(map(str, place.rglob("*.parquet"))) if place.is_dir() else sorted(glob.glob(str(place)))
            if not files:
                raise UserError(f"data.path={path} fits no files; check the path, and the pattern if it is one")
            found = datasets.load_dataset("parquet", data_files={"train": files})
        else:
            there = str(place) if place.is_dir() else name
            found = datasets.load_dataset(there, asked.get("config"), revision=asked.get("revision"))
    except UserError:
        raise
    except Exception as error:  # the package, and those that it stands on, have errors of many kinds
        raise UserError(
            f"data.path={path} cannot be opened by datasets ({type(error).__name__}: {' '.join(str(error).split())}); "
            "check the name, the network, or the files"
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def from_rows(title: str, rows: Any, settings: SourceSettings) -> TableSource:
    """Finds the columns of images, classes and captions. Raises UserError where they are not to be told."""
    import datasets

    features = rows.features
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    column = settings.image_field or only(title, pictures, rows)
    if column not in features:
        raise UserError(f"{title} has no column {column}, expected data.image_field to be of {', '.join(features)}")
    if isinstance(features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    elif not holds_bytes(features[column]):
        raise UserError(f"the column {column} of {title} is {features[column]}, expected images: files as bytes")
    if not len(rows):
        raise UserError(f"{title} has no rows, expected images")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    label = settings.label_field or (classes[0] if len(classes) == 1 else None)
    labels = names = None
    if label is not None:
        if label not in features:
            raise UserError(f"{title} has no column {label}, expected data.label_field to be of {', '.join(features)}")
        labels, names = classes_of(title, rows, label, features[label])
    captions = next((n for n in CAPTIONS if n in features and getattr(features[n], "dtype", "") == "string"), None)
    return TableSource(
        title, rows, column, labels, names, captions, max_pixels=settings.max_pixels, jpeg_margin=settings.jpeg_margin
    )


def only(title: str, columns: list[str], rows: Any) -> str:
    columns = columns or [name for name, feature in rows.features.items() if holds_bytes(feature)]
    if len(columns) != 1:
        said = f"the columns of images {', '.join(columns)}" if columns else f"only {', '.join(rows.features)}"
        raise UserError(f"{title} has {said}, expected one column of images: say which by --data.image_field")
    return columns[0]


def holds_bytes(feature: Any) -> bool:
    """Of encoded files: bytes, or a struct with them, as parquet files have it that other programs wrote."""
    if isinstance(feature, dict):
        return "bytes" in feature and holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def classes_of(title: str, rows: Any, label: str, feature: Any) -> tuple[np.ndarray, Sequence[str] | None]:
    """Labels, n, -1 where a row has none, and the names of classes. Raises UserError for other columns."""
    values = rows.select_columns([label])[:][label]
    if getattr(feature, "names", None) is not None:
        return np.array([-1 if value is None else value for value in values], dtype=np.int64), feature.names
    if all(value is None or isinstance(value, str) for value in values):
        names = sorted({value for value in values if value is not None})
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers.get(value, -1) for value in values], dtype=np.int64), names
    if all(value is None or isinstance(value, int) for value in values):
        return np.array([-1 if value is None else value for value in values], dtype=np.int64), None
    raise UserError(f"the column {label} of {title} is {feature}, expected classes: numbers or names")


def lengths_of(rows: Any, column: str) -> np.ndarray:
    """Bytes of each image, n, int64, 0 where it is not in the table: by the table's offsets, without reading it."""
    import pyarrow.compute as compute

    lengths = []
    for batch in rows.with_format("arrow").iter(batch_size=100_000):
        values = batch.column(column)
        if hasattr(values.type, "get_field_index") and values.type.get_field_index("bytes") >= 0:
            values = compute.struct_field(values, "bytes")
        lengths.append(np.asarray(compute.fill_null(compute.binary_length(values), 0)).astype(np.int64))
    return np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
