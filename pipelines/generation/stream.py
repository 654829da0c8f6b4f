"""The batches of a script's stream, written as `zellige generate` writes its samples."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.processes import process_state
from common.wording import either
from pipelines.generated import Generated
from pipelines.generation.finishing import SAMPLES_NAME
from pipelines.generation.layout import PER_SHARD, SUFFIXES, Format, Layout
from pipelines.generation.plan import Plan
from pipelines.generation.records import (
    RECORD,
    RECORDS,
    Record,
    recorded_ends,
    sizes_of,
    tar_size,
    with_records,
    write_record,
)
from pipelines.generation.results import Output
from pipelines.generation.sinks import Sink, files_of_unit, tar_of_unit
from pipelines.generation.store import Store, open_store
from pipelines.generation.work import Work, results_of
from pipelines.generation.writers import Writers
from pipelines.latents.pipeline import Drawn
from pipelines.pictures import to_pils

AT_ONCE = 64  # images that are handed to the writers together


class Sample(NamedTuple):
    number: int
    picture: Image.Image
    label: int | None


def write_stream(
    batches: Iterable[Generated | Drawn | Tensor],
    out: str | Path,
    *,
    format: Format = "png",
    quality: int | None = None,
    images_per_shard: int = PER_SHARD,
    first_index: int = 0,
) -> int:
    """Writes the images of a stream and returns how many there are now: files by thousands in folders, or tars.

    batches: what `stream` of a pipeline yields, or tensors b c H W in [-1, 1]. out: a folder, or an address such as
    s3://bucket/place. format, quality, images_per_shard: as of `zellige generate`. first_index: number of the first
    image, a multiple of images_per_shard: what `written_samples(out)` says, to go on where a script was stopped. In
    memory is one batch. `samples.jsonl` is written when the stream ends. Raises UserError.
    """
    if format not in SUFFIXES:
        raise UserError(f"format={format}, expected {either(tuple(SUFFIXES))}")
    output = Output(out=str(out), format=format, quality=quality, images_per_shard=images_per_shard)
    if first_index < 0 or first_index % images_per_shard:
        raise UserError(f"first_index={first_index}, expected a multiple of images_per_shard={images_per_shard}")
    store, layout = open_store(str(out)), Layout(output.files, images_per_shard)
    work = Work(store, layout, Plan(0, 0, lambda samples: None), AT_ONCE, None, output.form)
    settings = {"format": format, "quality": work.form.quality if format == "jpeg" else None}
    settings["images_per_shard"] = images_per_shard
    with results_of(work, "stream", settings, process_state(), {}, {}), Writers(2 * AT_ONCE) as writers:
        if (there := whole_units(recorded_ends(store), images_per_shard)) < first_index:
            raise UserError(f"first_index={first_index}, but {store.title} holds {there} images; go on from there")
        forget_records(store, first_index)  # of a former stream, whose images are replaced
        num = first_index
        for start, samples in groupby(numbered(batches, first_index), lambda s: s.number - s.number % images_per_shard):
            num = start + write_unit(work, writers, start, samples)
        write_lines(store, layout, num)
    return num


def written_samples(out: str | Path, *, images_per_shard: int = PER_SHARD) -> int:
    """How many images `write_stream` has written to a place, as far as thousands are complete: where to go on."""
    return whole_units(recorded_ends(open_store(str(out))), images_per_shard)


def forget_records(store: Store, first: int) -> None:
    """Takes the records of units from this sample on away."""
    for name in store.names(RECORDS):
        if (match := RECORD.fullmatch(name)) and int(match[1]) >= first:
            store.remove(f"{RECORDS}/{name}")


def whole_units(ends: dict[int, int], per_shard: int) -> int:
    """Samples in complete units from the first one on."""
    start = 0
    while ends.get(start, 0) == start + per_shard:
        start += per_shard
    return start


def numbered(batches: Iterable[Generated | Drawn | Tensor], first: int) -> Iterator[Sample]:
    number = first
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch.images
        labels = batch.labels.tolist() if isinstance(batch, Generated) and batch.labels is not None else None
        for place, picture in enumerate(to_pils(images)):
            yield Sample(number, picture, None if labels is None else labels[place])
            number += 1


def write_unit(work: Work, writers: Writers, start: int, samples: Iterable[Sample]) -> int:
    """Returns how many there were."""
    told: deque[dict[str, Any]] = deque()
    labels: list[int | None] = []
    store, layout = work.store, work.layout
    opened: AbstractContextManager[Sink] = (
        tar_of_unit(store, layout, range(start, start + layout.per_shard), iter(told.popleft, None), work.form, writers)
        if layout.format == "tar"
        else files_of_unit(store, layout, work.form, writers)
    )
    with opened as sink:
        for sample in samples:
            told.append({"index": sample.number, "label": sample.label})
            labels.append(sample.label)
            sink.take(sample.number, sample.picture)
            if len(labels) % AT_ONCE == 0:
                sink.flush()
    unit = range(start, start + len(labels))
    known = None if None in labels else [label for label in labels if label is not None]
    if layout.format == "tar":
        write_record(store, unit, Record([*sink.sizes.values()], tar_size(store, layout, unit), known))
    else:
        write_record(store, unit, Record(sizes_of(store, layout, unit), None, known))
    return len(labels)


def write_lines(store: Store, layout: Layout, num: int) -> None:
    """samples.jsonl, from the records."""
    units = layout.units(range(num), num)
    with store.writing(SAMPLES_NAME) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for unit, record in with_records(store, units, recorded_ends(store)):
            if record is None:
                continue
            where = {"tar": layout.tar(unit.start)} if layout.format == "tar" else {}
            for place, i in enumerate(unit):
                name = layout.file(i) if where else layout.path(i)
                label = None if record.labels is None else record.labels[place]
                line = {"file": name, **where, "index": i, "label": label, "bytes": record.sizes[place]}
                file.write(json.dumps(line) + "\n")
