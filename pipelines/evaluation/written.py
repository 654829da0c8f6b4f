"""Images that `generate`, `inpaint`, `vary` or a script's stream wrote: files, tars, or objects of a bucket, by their
record."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.file_names import is_below
from common.files import json_value, read_json
from common.owned_folder import SETTINGS_NAME, owner_of
from common.wording import one_line
from images.contract import ImageSource, SourceSettings, check_labels
from images.encoded import EncodedImages
from images.files import JPEG_MARGIN, MAX_PIXELS, BadImageError, is_readable
from images.sources import FileSource
from images.tars import open_tars
from pipelines.generation.bucket import recorded_in
from pipelines.generation.finishing import SAMPLES_NAME
from pipelines.generation.store import FolderStore, Store, is_address, open_store

COMMANDS = ("generate", "inpaint", "vary", "stream")
NO_PLACE = re.compile(r"[*?\[{]|\.tar$|\.npz$|\.parquet$")  # in a path that names no folder
READ_AHEAD = 32  # objects that are fetched together


class Objects(EncodedImages):
    """Images that are objects of a bucket, decoded when asked for; a few are fetched together, as they are read in
    order."""

    def __init__(self, store: Store, files: Sequence[str], sizes: np.ndarray, labels: np.ndarray | None) -> None:
        """files: n; sizes: n, in bytes; labels: n."""
        self.title = store.title
        self.store, self.paths, self.bytes = store, files, sizes
        self.max_pixels, self.jpeg_margin = MAX_PIXELS, JPEG_MARGIN
        self.labels, self.class_names = check_labels(self.title, len(files), labels, None)
        self.fetched: tuple[int, list[bytes]] = (-1, [])  # those from this number on

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def location(self, index: int) -> str:
        return self.store.path(self.paths[index])

    def content(self, index: int) -> io.BytesIO:
        """Raises UserError where an object is gone."""
        first = index - index % READ_AHEAD
        if self.fetched[0] != first:
            self.fetched = first, self.store.read(self.paths[first : first + READ_AHEAD])
        return io.BytesIO(self.fetched[1][index - first])

    def still_bad(self, location: str) -> bool:
        name = location.removeprefix(self.store.path(""))
        if name == location or name not in self.paths:
            return False
        try:
            return not is_readable(self.content(self.paths.index(name)), self.max_pixels)
        except BadImageError:
            return True

    def caption(self, index: int) -> str | None:
        return None

    def files(self, indices: Sequence[int]) -> list[Path]:
        return []

    def stored_size(self, index: int) -> int | None:
        return int(self.bytes[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join(self.paths).encode())
        digest.update(self.bytes.tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


class Lines(NamedTuple):
    """What the record of images tells of them."""

    files: list[str]  # n
    tars: list[str] | None  # n, that they are in
    sizes: np.ndarray  # n, int64, in bytes; 0 where an earlier build did not record it
    labels: np.ndarray | None  # n, int64


def made_with(path: str) -> dict[str, Any] | None:
    """The settings that a place of images records which one of `COMMANDS` made; None of others."""
    if is_address(path):
        if NO_PLACE.search(path):
            return None
        settings: dict[str, Any] = {}
        with suppress(UserError):  # it may be of a kind that nobody can list
            settings = recorded_in(open_store(path))
        return settings if settings.get("command") in COMMANDS else None
    place = Path(path).expanduser()
    return read_json(place / SETTINGS_NAME) if owner_of(place) in COMMANDS else None


def written(path: str) -> ImageSource | None:
    """The images of a place that one of `COMMANDS` wrote, with the classes that were asked for; None of other places,
    and of those of earlier builds without a record of their images. Raises UserError for one that is not finished, or
    was edited."""
    if (settings := made_with(path)) is None:
        return None
    store = open_store(path)
    command = settings.get("command", "generate")
    if store.sizes("", [SAMPLES_NAME])[0] < 0:
        if command != "generate":
            return None
        raise UserError(f"made={path} is not finished: repeat the command of `zellige generate` that began it")
    lines = read_lines(store, path, command)
    if lines.tars is not None:
        return in_tars(path, lines)
    if isinstance(store, FolderStore):
        names = None if lines.labels is None else [str(label) for label in range(int(lines.labels.max()) + 1)]
        return FileSource(store.folder, np.array([os.fsencode(file) for file in lines.files]), lines.labels, names)
    return Objects(store, lines.files, lines.sizes, lines.labels)


def read_lines(store: Store, path: str, command: str) -> Lines:
    where = store.path(SAMPLES_NAME)
    try:
        samples = [json_value(line) for line in store.read([SAMPLES_NAME])[0].decode("utf-8").splitlines()]
        labels, files = [sample["label"] for sample in samples], [sample["file"] for sample in samples]
        tars = [sample["tar"] for sample in samples] if any("tar" in sample for sample in samples) else None
        sizes = np.array([sample.get("bytes", 0) for sample in samples], dtype=np.int64)
        known = None if None in labels else np.array(labels, dtype=np.int64)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{where} is damaged or was edited ({one_line(error, 150)}): repeat the command of `zellige {command}` "
            "that made it, or copy the images alone and name their folder"
        ) from error
    if elsewhere := [file for file in [*files, *(tars or [])] if not is_below(file)]:
        raise UserError(
            f"{where} names {elsewhere[0]!r}, expected files of its own folder; it was edited: do not trust it, or "
            "copy the images alone and name their folder"
        )
    if not samples:
        raise UserError(f"{where} names no images; name another place")
    return Lines(files, tars, sizes, known)


def in_tars(path: str, lines: Lines) -> ImageSource:
    """Raises UserError for tars that hold other images than are recorded."""
    assert lines.tars is not None
    source = open_tars(path, SourceSettings())
    found = {source.name(i): i for i in range(len(source))}
    places = [found.get(f"{tar}/{file}") for tar, file in zip(lines.tars, lines.files, strict=True)]
    if None in places or len(places) != len(found):
        raise UserError(
            f"made={path} holds other images in its tars than {SAMPLES_NAME} names: repeat the command that made them"
        )
    labels = None
    if lines.labels is not None:
        labels = np.empty(len(source), dtype=np.int64)
        labels[np.array(places, dtype=np.int64)] = lines.labels
    source.labels, source.class_names = check_labels(source.title, len(source), labels, None)
    return source
