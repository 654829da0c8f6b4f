"""Variants of as many images as there are: each a numbered result, in folders, tars or a bucket, whoever makes it.

Image i has the results i * variants, i * variants + 1, ... A unit of `generation/` is of whole images here, so jobs
share a folder by ranges of these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.owned_folder import SHEET_NAME
from common.processes import process_state
from common.wording import counted
from images.files import BadImageError
from images.listing import listing_of
from pipelines.editing import View, check_variants
from pipelines.generation.encoder import Form, encoded
from pipelines.generation.finishing import NPZ_NAME, SAMPLES_NAME, write_npz, write_samples
from pipelines.generation.layout import MOST_PER_SHARD, PART, PER_SHARD, Layout
from pipelines.generation.originals import ORIGINALS, Originals
from pipelines.generation.plan import Plan
from pipelines.generation.records import RECORDS
from pipelines.generation.results import (
    DEFAULTS,
    Output,
    check_place,
    form_of,
    note_other_batches,
    recorded_of,
    what_others_owe,
)
from pipelines.generation.sinks import pictures_of
from pipelines.generation.store import FolderStore, Store, open_store
from pipelines.generation.work import Draw, Use, Work, make_missing, results_of
from pipelines.image_folders import Targets, scale_within
from pipelines.pictures import contact_sheet, to_pil
from pipelines.sampling_options import DrawingOptions
from pipelines.settings import check_apart
from stage2_prior.sampling_config import SamplingConfig

SHEET_ROWS = 16
SHEET_SIDE = 512  # pixels: longer pictures are scaled down for the sheet
UNREAD_NAMED = 5  # images in a message
RESULTS = "*.[pjtw][npae][grb]*"  # pattern of .png, .jpg, .tar and .webp files
BEFORE = {**DEFAULTS, **SamplingConfig().record, "paste": False, "own_size": False, "mask": None}
"""What a record from before there were these settings was made with."""


@dataclass(frozen=True, kw_only=True)
class VariantsOptions(DrawingOptions):
    """Which images are changed, and where what becomes of them goes."""

    images: str  # folder of images, or one image file; scaled and cropped to the size that the model makes
    out: str  # folder for NAME_VARIANT.png, sheet.png and samples.jsonl, or an address such as s3://bucket/place
    variants: int = 4  # of each image
    format: Literal["png", "webp", "jpeg", "tar", "npz"] = "png"  # tar: for webdataset; npz: all in samples.npz too
    quality: int | None = None  # of jpeg, 1 to 100; left out: 95. webp and png lose nothing
    compression: int | None = None  # of png, 0 to 9; left out: 6. 1 takes a third of the time, and a few percent more
    range: str | None = None  # FIRST:END, such as 0:10000: only these of the images, for jobs that share a folder
    batch_size: int | None = None  # variants at a time, of several images; left out: those of one
    images_per_shard: int | None = None  # whose variants are in one folder, or tar; left out: 1000, or as it was begun

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variants(self.variants)
        _ = self.output  # which raises UserError

    @property
    def output(self) -> Output:
        return Output(
            out=self.out,
            format=self.format,
            quality=self.quality,
            compression=self.compression,
            images_per_shard=self.images_per_shard,
            range=self.range,
            batch_size=self.batch_size,
        )


ViewOf = Callable[[int], View | None]
"""Of an image, by its number in the folder; None where it cannot be read."""

Drawer = Callable[[range, Sequence[int], ViewOf], Iterator[tuple[int, Tensor]]]
"""(a batch of results, those of them that are wanted, the image of each number) -> results, by number, c H W each; none
of images that cannot be read."""


def in_batches(draw: Callable[[Sequence[View], range], Iterable[Tensor]], variants: int) -> Drawer:
    """draw: (what the model sees for each of a batch's results, their numbers) -> c H W each. A batch is drawn as a
    whole, and an image that cannot be read is drawn as another, and dropped."""

    def drawn(batch: range, wanted: Sequence[int], view_of: ViewOf) -> Iterator[tuple[int, Tensor]]:
        views = [view_of(i // variants) for i in batch]
        readable = {i for i, view in zip(batch, views, strict=True) if view is not None}
        if readable.isdisjoint(wanted):
            return
        other = next(view for view in views if view is not None)
        for i, image in zip(batch, draw([other if view is None else view for view in views], batch), strict=True):
            if i in readable and i in wanted:
                yield i, image

    return drawn


def each_alone(draw: Callable[[View, int], Iterable[Tensor]], variants: int) -> Drawer:
    """draw: (an image, its number) -> its variants, c H W each."""

    def drawn(batch: range, wanted: Sequence[int], view_of: ViewOf) -> Iterator[tuple[int, Tensor]]:
        for number in sorted({i // variants for i in wanted}):
            if (view := view_of(number)) is not None:
                for variant, image in enumerate(draw(view, number)):
                    if (i := number * variants + variant) in wanted:
                        yield i, image

    return drawn


class Folder(NamedTuple):
    """The images of a folder, or one image file, by number."""

    root: Path
    paths: np.ndarray  # n, bytes, relative to it, sorted
    targets: Targets

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return os.fsdecode(self.paths[number])

    def path(self, number: int) -> Path:
        return self.root / self.name(number)


def open_folder(images: str) -> Folder:
    """Raises UserError for one without images."""
    source = Path(images)
    if source.is_file():
        paths = np.array([os.fsencode(source.name)])
        return Folder(source.parent, paths, Targets(paths))
    if not source.is_dir():
        raise UserError(f"there is no folder or file {source}; name a folder of images or an image file")
    if not len(paths := listing_of(source).paths):
        raise UserError(f"{source} holds no images; name a folder with image files in it, or in its subfolders")
    return Folder(source, paths, Targets(paths))


def write_variants(
    command: str,
    images: str,
    output: Output,
    variants: int,
    settings: Mapping[str, Any],
    read: Callable[[Path], View],
    draw: Drawer,
    *,
    label: int | None = None,
    beside: Callable[[Path], Sequence[Path]] = lambda path: (),
) -> str:
    """Makes what is missing of `variants` results for each image, and a sheet: the original, what is kept of it, and
    the first variants in a row. Returns one line.

    command: whose place it is. settings: what the results depend on besides the images, for the record. label: of the
    class that all are drawn of. beside: files beside an image that its results depend on too. A result that was made of
    other bytes, or under another number, is made anew. Raises UserError, also where no image can be read.
    """
    check_place(output.out)
    folder, state = open_folder(images), process_state()
    store = open_store(output.out)
    if isinstance(store, FolderStore):
        check_apart(store.folder, Path(images))
    recorded = recorded_of(store, RESULTS)
    layout = layout_of(output, recorded, variants, folder)
    num = len(folder) * variants
    if (part := output.part) is not None:
        layout._replace(per_shard=layout.per_shard // variants).check_part(part, len(folder))
    begun_with = recorded.get("batch_size")
    work = Work(
        store,
        layout,
        plan_of(folder, variants, label),
        output.batch_size or begun_with or variants,
        None if part is None else range(part.start * variants, part.stop * variants),
        output.form,
    )
    originals = Originals(
        store, layout, variants, len(folder), folder.name, lambda i: [folder.path(i), *beside(folder.path(i))]
    )
    work = work._replace(stale=originals.stale)
    note_other_batches(work, begun_with, state)
    form = {
        **form_of(output, layout),
        "images_per_shard": None if layout.flat else layout.per_shard // variants,
        "plan": None,
        "batch_size": begun_with if recorded else output.batch_size,
    }
    settings = {**settings, "images": str(Path(images).resolve()), "variants": variants, **form}
    free = {
        "batch_size": lambda: True,
        "images": originals.are_those_recorded,
        "mask": lambda: "mask" not in recorded,  # nothing is kept of what such a build made
    }
    with results_of(work, command, settings, state, BEFORE, free, part, RESULTS):
        found = make_missing(work, drawing(work, draw, folder, variants, read, originals), state)
        if (line := what_others_owe(work, found)) is not None:
            return line
        left_out = write_samples(store, layout, work.plan)
        unread = [i // variants for i in left_out if i % variants == 0]
        if len(left_out) == num:
            forget(store)
            raise UserError(f"none of the images of {images} can be read; name a folder of images or an image file")
        write_sheet(store, layout, folder, variants, read, set(unread))
        if output.format == "npz":
            out = set(left_out)
            write_npz(store, layout, [i for i in range(num) if i not in out], None)
    return told(store, folder, variants, found.images, unread, as_npz=output.format == "npz")


def layout_of(output: Output, recorded: Mapping[str, Any], variants: int, folder: Folder) -> Layout:
    """That of the folder as it was begun: earlier builds had all in one."""
    most = max(1, MOST_PER_SHARD // variants)
    flat = bool(recorded) and recorded.get("images_per_shard") is None
    per_shard = output.images_per_shard or recorded.get("images_per_shard") or min(PER_SHARD, most)
    if per_shard > most:
        raise UserError(
            f"images_per_shard={per_shard} with variants={variants}, expected at most {most}: not more than "
            f"{MOST_PER_SHARD} files in a folder"
        )
    layout = Layout(output.files, per_shard * variants, flat, partial(stem, folder, variants))
    if not flat and layout.format != "tar" and np.strings.startswith(folder.paths, PART.encode()).any():
        raise UserError(
            f"{folder.root} holds subfolders or images called {PART}..., as folders of results are; give --format tar, "
            "or rename them"
        )
    return layout


def stem(folder: Folder, variants: int, number: int) -> str:
    """The name of a result's file, without its ending."""
    return f"{folder.targets.stem(number // variants)}_{number % variants}"


def plan_of(folder: Folder, variants: int, label: int | None) -> Plan:
    return Plan(
        len(folder) * variants,
        0,
        lambda samples: None if label is None else [label] * len(samples),
        more=lambda i: {"image": folder.name(i // variants), "variant": i % variants},
    )


def drawing(
    work: Work,
    draw: Drawer,
    folder: Folder,
    variants: int,
    read: Callable[[Path], View],
    originals: Originals,
) -> Draw:
    """What makes a batch of results."""
    begun: set[int] = set()

    def make(batch: range, wanted: Sequence[int], use: Use) -> None:
        start = batch.start - batch.start % work.layout.per_shard
        if start not in begun:
            originals.begin(work.layout.unit(start, work.plan.num))
            begun.add(start)
        views: dict[int, View | None] = {}

        def view_of(number: int) -> View | None:
            if number not in views:
                try:
                    views[number] = read(folder.path(number % len(folder)))  # beyond the last one: to fill up a batch
                except BadImageError:
                    views[number] = None
            return views[number]

        missing = set(wanted)
        for i, image in draw(batch, wanted, view_of):
            use(i, to_pil(image))
            missing.discard(i)
        for i in missing:
            use(i, None)

    return make


def write_sheet(
    store: Store,
    layout: Layout,
    folder: Folder,
    variants: int,
    read: Callable[[Path], View],
    unread: set[int],
) -> None:
    rows: list[Sequence[Image.Image]] = []
    shown = [i for i in range(min(len(folder), SHEET_ROWS + len(unread))) if i not in unread][:SHEET_ROWS]
    for number in shown:
        try:
            view = read(folder.path(number))
        except BadImageError:  # it came to harm since it was read
            continue
        made = pictures_of(store, layout, range(number * variants, (number + 1) * variants))
        row = [view.original(), *([view.shown()] if view.keep is not None else []), *made]
        rows.append([scale_within(picture, SHEET_SIDE) for picture in row])
    store.write(SHEET_NAME, encoded(contact_sheet(rows), Form("png")))


def forget(store: Store) -> None:
    """What is recorded of images of which none can be read."""
    for folder in (RECORDS, ORIGINALS):
        for name in store.names(folder):
            store.remove(f"{folder}/{name}")
    store.remove(SAMPLES_NAME)


def told(store: Store, folder: Folder, variants: int, made: int, unread: Sequence[int], *, as_npz: bool) -> str:
    count = len(folder) - len(unread)
    of_each = f"{counted(variants, 'variant')} of {'each of ' * (count > 1)}"
    line = f"{of_each}{counted(count, 'image')} in {store.title}, {made} of them new"
    line += f", all in {store.path(NPZ_NAME)}" if as_npz else ""
    line += f", the first on {store.path(SHEET_NAME)}"
    if not unread:
        return line
    named = ", ".join(map(folder.name, unread[:UNREAD_NAMED])) + (" ..." if len(unread) > UNREAD_NAMED else "")
    return f"{line}; {counted(len(unread), 'image')} could not be read ({named})"
