"""Samples into a folder or a bucket: opened with its settings, completed, and finished by the last job of all."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import PartialState

from common.errors import UserError
from common.folder_lock import parts_of
from common.wording import counted
from pipelines.generation.bucket import has_results, recorded_in
from pipelines.generation.encoder import QUALITY, Form
from pipelines.generation.finishing import (
    images_in_npz,
    lines_in,
    summary,
    write_npz,
    write_samples,
    write_sheet,
)
from pipelines.generation.layout import MOST_PER_SHARD, PER_SHARD, Format, Layout
from pipelines.generation.plan import Plan
from pipelines.generation.store import FolderStore, Store, is_address, open_store
from pipelines.generation.work import (
    BATCH_SIZE,
    NUMBERED,
    Draw,
    Missing,
    Work,
    find_missing,
    is_complete,
    make_missing,
    results_of,
)
from pipelines.settings import recorded_settings

PART = re.compile(r"(\d+):(\d+)")

# What a record from before there were these settings was made with.
DEFAULTS = {
    "format": "png",
    "quality": None,
    "compression": None,
    "images_per_shard": None,
    "plan": None,
    "batch_size": None,
}


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where samples go, in which form, and which of them. Raises UserError for what cannot be."""

    out: str  # folder, or address of a bucket
    format: Literal["png", "webp", "jpeg", "tar", "npz"] = "png"
    quality: int | None = None  # of jpeg
    compression: int | None = None  # of png, 0 to 9
    images_per_shard: int | None = None  # in a folder or a tar; None: as the folder was begun, of a new one PER_SHARD
    range: str | None = None  # FIRST:END
    batch_size: int | None = None  # None: as the folder was begun, else BATCH_SIZE

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}, expected at least 1 image")
        if self.quality is not None and (self.format != "jpeg" or not 1 <= self.quality <= 100):
            raise UserError(f"quality={self.quality} with format={self.format}, expected 1 to 100, with jpeg only")
        if self.compression is not None and (self.format in ("jpeg", "webp") or not 0 <= self.compression <= 9):
            raise UserError(
                f"compression={self.compression} with format={self.format}, expected 0 to 9, with png, tar or npz only"
            )
        if self.images_per_shard is not None and not 1 <= self.images_per_shard <= MOST_PER_SHARD:
            raise UserError(f"images_per_shard={self.images_per_shard}, expected 1 to {MOST_PER_SHARD}")
        if self.range is not None and not PART.fullmatch(self.range):
            raise UserError(f"range={self.range}, expected FIRST:END, such as 0:100000, without the last number")
        if self.range is not None and self.format == "npz":
            raise UserError(
                f"got range={self.range} with format=npz, expected png, webp, jpeg or tar: an archive is of all"
            )

    @property
    def files(self) -> Format:
        return "png" if self.format == "npz" else self.format

    @property
    def form(self) -> Form:
        return Form(self.files, self.quality or QUALITY, self.compression)

    @property
    def part(self) -> builtins.range | None:
        match = PART.fullmatch(self.range or "")
        return builtins.range(int(match[1]), int(match[2])) if match else None


def generate_results(
    output: Output,
    plan: Plan,
    settings: Mapping[str, Any],
    draw: Draw,
    state: PartialState,
    *,
    turns: int,
    defaults: Mapping[str, Any],
    labels_of_npz: Callable[[int], list[int] | None],
) -> str:
    """Makes what is missing of a plan's samples; returns one line that says what was made and where.

    settings: what the samples depend on besides the form of the files. turns: how many classes take turns, 0 where they
    do not. defaults: of settings that an earlier build did not record. labels_of_npz: of the plan's first samples,
    asked for an archive. Raises UserError for a place begun with other settings or by another command.
    """
    store = open_store(output.out)
    recorded = recorded_of(store)
    begun_with = batch_size_of(store, recorded)
    asked = output.batch_size or begun_with
    layout = layout_of(output, recorded, asked)
    work = Work(store, layout, plan, asked, output.part, output.form)
    if work.part is not None:
        layout.check_part(work.part, plan.num)
    form = {
        **form_of(output, layout),
        "plan": None if plan.rows is None else plan.rows.sha256,
        "batch_size": begun_with if recorded else output.batch_size,
    }
    note_other_batches(work, begun_with, state)
    free = {"batch_size": lambda: True}
    with results_of(work, "generate", {**settings, **form}, state, {**defaults, **DEFAULTS}, free, work.part):
        found = make_missing(work, draw, state)
        if (line := what_others_owe(work, found)) is not None:
            return line
        num = found.work.plan.num
        write_samples(store, layout, found.work.plan)
        write_sheet(store, layout, found.work.plan, turns)
        if output.format == "npz":
            write_npz(store, layout, range(plan.num), labels_of_npz(plan.num))
        elif images_in_npz(store) not in (None, num):  # an earlier run's, of which it was all
            write_npz(store, layout, range(num), labels_of_npz(num))
    return summary(store, plan.num, found.images, as_npz=output.format == "npz")


def form_of(output: Output, layout: Layout) -> dict[str, Any]:
    """The settings that say how results are written."""
    return {
        "format": output.files,
        "quality": output.form.quality if output.format == "jpeg" else None,
        "compression": output.compression,
        "images_per_shard": output.images_per_shard or (None if layout.flat else layout.per_shard),
    }


def note_other_batches(work: Work, begun_with: int | None, state: PartialState) -> None:
    """Says where what is missing is made in other batches than what is there."""
    if begun_with and work.asked != begun_with and state.is_main_process:
        print(
            f"note: {work.store.title} was begun in batches of {begun_with}; what is missing is made in batches of "
            f"{work.batch_size}, and has the same codes but where a draw lies on the edge of rounding"
        )


def what_others_owe(work: Work, found: Missing) -> str | None:
    """The line of a job whose own part is made, while something of others is not; None where all is there."""
    num = work.plan.num
    if not is_complete(found.work):
        part = num if work.part is None else len(work.part)
        return (
            f"{counted(part, 'image')} of {num} in {work.store.title}, {found.images} of them missed at the start; "
            "others are still at work: who is the last writes samples.jsonl and sheet.png, and where a process "
            "died, the same command completes its share"
        )
    if work.part is not None and (lost := find_missing(found.work._replace(part=None))).units:
        return (
            f"{counted(len(work.part), 'image')} of {num} in {work.store.title}, {found.images} of them missed at "
            f"the start; {counted(lost.images, 'image')} of other ranges, or what is recorded of them, came to "
            "harm since they were made: where no job is at them, the same command without --range makes them"
        )
    return None


def recorded_of(store: Store, results: str = NUMBERED) -> dict[str, Any]:
    """The settings that samples which are there were made with; empty where there are none. results: their pattern."""
    if isinstance(store, FolderStore):
        return recorded_settings(store.folder, None if parts_of(store.folder) else results)  # jobs go by the record
    return recorded_in(store) if has_results(store) else {}


def batch_size_of(store: Store, recorded: Mapping[str, Any]) -> int | None:
    """The batch size that a folder was begun with; None if nobody asked for one. Builds that recorded no command always
    recorded a size: where it is the number of images, it was taken from that."""
    size = recorded.get("batch_size")
    if recorded and "command" not in recorded and size == min(BATCH_SIZE, lines_in(store)):
        return None
    return size


def layout_of(output: Output, recorded: Mapping[str, Any], batch_size: int | None) -> Layout:
    """That of the folder as it was begun. Earlier builds began no batch anew before the end."""
    if recorded and recorded.get("images_per_shard") is None:
        size = recorded.get("batch_size") or batch_size or BATCH_SIZE
        return Layout(output.files, size * -(-PER_SHARD // size), flat=True)
    per_shard = output.images_per_shard or recorded.get("images_per_shard")
    return Layout(output.files, per_shard or min(max(PER_SHARD, batch_size or 0), MOST_PER_SHARD))


def check_place(out: str) -> None:
    """Raises UserError for an address that nothing here can reach, before a model is opened for it."""
    if is_address(out):
        open_store(out)
