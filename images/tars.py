"""Tars of webdataset as a source of images: any image at any time, by an index of where each lies.

Each tar is walked through once, from header to header; the index is kept among the user's caches and holds as long as
the tar has the same size and time. So which images a step sees is a function of the step, as with files, and there is
no shuffle buffer whose content a restart would lose.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.cache import find_arrays, keep_arrays
from common.errors import UserError
from common.processes import on_main_process, process_state
from common.progress import progress_bar
from common.wording import counted
from images.contract import SourceSettings, check_labels
from images.encoded import EncodedImages
from images.files import FORMATS, BadImageError, is_readable
from images.tar_files import Tar, find_tars, is_url, read_span, shared_folder, system_of
from images.tar_index import TarIndex, caption_in_json, make_index

KIND = "tars"  # of caches
FORMAT = 1  # of an index
CLASS_NAMES = "classnames.txt"  # beside the tars: a name on each line, of class 0 first
BYTES_PER_PIXEL = 16  # of a file, at most: four channels of 32 bits, as they are


class TarSource(EncodedImages):
    """The images of several tars, decoded when asked for."""

    def __init__(
        self,
        title: str,
        tars: Sequence[Tar],
        indexes: Sequence[TarIndex],
        class_names: Sequence[str] | None = None,
        *,
        max_pixels: int,
        jpeg_margin: float,
    ):
        """title: the folder that all tars lie in. Raises UserError for labels beyond the class names."""
        self.title = title
        self.tars = tars
        self.names = [index.names for index in indexes]
        self.spans, self.captions = (np.concatenate([index[at] for index in indexes]) for at in (1, 3))
        self.starts = np.cumsum([0, *map(len, self.names)])  # of each tar's images among all
        self.max_pixels = max_pixels
        self.jpeg_margin = jpeg_margin
        labels = np.concatenate([index.labels for index in indexes])
        known = labels if (labels >= 0).any() else None
        self.labels, self.class_names = check_labels(title, len(labels), known, class_names, lowest=-1)

    def __len__(self) -> int:
        return len(self.spans)

    def tar_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def member(self, index: int) -> tuple[Tar, str]:
        number = self.tar_of(index)
        return self.tars[number], os.fsdecode(self.names[number][index - self.starts[number]])

    def name(self, index: int) -> str:
        tar, member = self.member(index)
        return f"{tar.name}/{member}"

    def location(self, index: int) -> str:
        tar, member = self.member(index)
        return f"{tar.place}/{member}"

    def content(self, index: int) -> io.BytesIO:
        """The image's file. Raises BadImageError for one of no sensible length."""
        start, size = self.spans[index].tolist()
        if size > BYTES_PER_PIXEL * self.max_pixels:
            raise BadImageError(f"a file of {size:,} bytes, more than {self.max_pixels:,} pixels can need")
        return io.BytesIO(read_span(self.tars[self.tar_of(index)], start, size))

    def still_bad(self, location: str) -> bool:
        for number, tar in enumerate(self.tars):
            if location.startswith(f"{tar.place}/"):
                found = np.flatnonzero(self.names[number] == os.fsencode(location[len(tar.place) + 1 :]))
                return any(not self.is_readable(int(self.starts[number] + i)) for i in found)
        return False

    def is_readable(self, index: int) -> bool:
        try:
            return is_readable(self.content(index), self.max_pixels)
        except BadImageError:
            return False

    def caption(self, index: int) -> str | None:
        start, size, is_json = self.captions[index].tolist()
        if not size:
            return None
        text = read_span(self.tars[self.tar_of(index)], start, size).decode("utf-8", "replace")
        return caption_in_json(text) if is_json else text.strip()

    def files(self, indices: Sequence[int]) -> list[Path]:
        places = {self.tars[number].place for number in {self.tar_of(index) for index in indices}}
        return [Path(place) for place in sorted(places) if not is_url(place)]

    def stored_size(self, index: int) -> int | None:
        return int(self.spans[index, 1])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tar, names in zip(self.tars, self.names, strict=True):
            digest.update(os.fsencode(tar.name) + b"\0" + b"\0".join(names.tolist()) + b"\0\0")
            if is_url(tar.place):  # whose bytes nobody compares
                digest.update(str(tar.size).encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


def open_tars(path: str, settings: SourceSettings) -> TarSource:
    """The images of tars, with their classes and captions. Raises UserError for tars that are damaged or hold none."""

    def look() -> tuple[list[Tar], list[TarIndex]]:
        tars = find_tars(path)
        indexes = []
        with progress_bar(len(tars), "tars", what="indexed", delay=2) as progress:
            for tar in tars:
                indexes.append(index_of(tar, settings))
                progress.update()
        return tars, indexes

    tars, indexes = on_main_process(process_state(), look)
    if not sum(len(index.names) for index in indexes):
        fields = settings.image_field or ", ".join(FORMATS.split()[:4])
        raise UserError(f"{path} holds no images in {counted(len(tars), 'tar')}, expected members that end in {fields}")
    folder = shared_folder([tar.place for tar in tars]) or "/"
    names = Path(folder) / CLASS_NAMES
    known = names.read_text(encoding="utf-8").splitlines() if not is_url(folder) and names.is_file() else None
    return TarSource(folder, tars, indexes, known, max_pixels=settings.max_pixels, jpeg_margin=settings.jpeg_margin)


def index_of(tar: Tar, settings: SourceSettings) -> TarIndex:
    """Of one tar: the index that is kept, or a new one. Raises UserError."""
    key = f"{tar.place if is_url(tar.place) else os.path.realpath(tar.place)}\n{settings.image_field}\n{FORMAT}"
    mark = np.frombuffer(tar.mark.encode(), dtype=np.uint8)
    kept = None if settings.relist else find_arrays(KIND, key)
    if kept is not None and kept.keys() == {*TarIndex._fields, "mark"} and np.array_equal(kept["mark"], mark):
        return TarIndex(*(kept[name] for name in TarIndex._fields))
    if is_url(tar.place):
        system, path = system_of(tar.place)
        with system.open(path, "rb") as file:
            index = make_index(file, tar, settings.image_field)
    else:
        with open(tar.place, "rb", buffering=0) as file:  # headers lie far apart: nothing is read ahead
            index = make_index(file, tar, settings.image_field)
    keep_arrays(KIND, key, {**index._asdict(), "mark": mark})
    return index
