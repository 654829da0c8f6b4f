"""Folders of 8-bit images to one archive without loss."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image

from common.errors import UserError
from common.processes import on_main_process
from common.progress import progress_bar
from common.sources import Sources, times_of
from common.wording import counted
from images.files import BAD_FILES_NAME, BadImageError, BadImages, open_upright, to_array
from pipelines.codec.lossless import LosslessCodec
from pipelines.codec.lossless_archive import SEGMENT, SUFFIX, LosslessArchive, Segment, read_lossless
from pipelines.codec.lossless_facts import figures_of
from pipelines.devices import open_device
from pipelines.folder_kinds import PARTS_NAME
from pipelines.image_folders import image_names
from pipelines.pictures import quick_file
from pipelines.settings import results_folder

MODES_OF = {1: ("L", "1"), 3: ("RGB", "P")}  # of pictures, by channels: those whose pixels are read as they are


def compress_losslessly(model: str, images: str, out: Path, name: str, max_bad_share: float, device: str | None) -> str:
    """Writes the archive `name` of a folder of images, or of one image; returns one line.

    A run that was killed is taken up again from the segments in `images.parts`. Raises UserError for a model that
    cannot code without loss, for images that it does not know as they are, and for a folder that was begun otherwise.
    """
    state, place = open_device(device)
    source = Path(images)
    root = source if source.is_dir() else source.parent
    names = image_names(source)
    codec = LosslessCodec.from_pretrained(model)
    codec.to(place).exact  # noqa: B018 (refuses a model before anything is written)
    settings = {
        "model": codec.model.hex(),
        "prior": None,
        "tables": None,
        "images": str(source.resolve()),
        "mode": "lossless",
        "archive": True,
        "label": None,
        "crop": False,
        "max_side": None,
    }
    files = [root / own for own in names]
    sources = Sources(out)
    moved = {"images": lambda: sources.are_at({name: files})}
    with results_folder(out, "compress", settings, state, may_change=moved, results=f"*{SUFFIX}"):
        before = times_of(files)  # first of all: what changes from now on may be in it as it was
        if own_archive(out / name, codec) is not None and sources.is_current(name, files):
            if state.is_main_process:  # what a run left that was killed as it ended
                remove_parts(out, sources)
            return f"{out / name} is there already"
        state.wait_for_everyone()
        bad_images = BadImages(len(names), out / BAD_FILES_NAME, max_share=max_bad_share, option="--max_bad_share")
        on_main_process(state, lambda: bad_images.keep_only([str(root)]))
        chunks = [names[start : start + SEGMENT] for start in range(0, len(names), SEGMENT)]
        paths = [out / PARTS_NAME / f"{number:06}{SUFFIX}" for number in range(len(chunks))]
        mine = list(zip(chunks, paths, strict=True))[state.process_index :: state.num_processes]
        with progress_bar(sum(map(len, chunks)), "images", shown=state.is_main_process) as progress:
            for chunk, path in mine:
                own, part = [root / one for one in chunk], f"{PARTS_NAME}/{path.name}"
                if own_archive(path, codec) is None or not sources.is_current(part, own):
                    times = times_of(own)
                    segment = read_and_coded(chunk, root, codec, bad_images)
                    if segment is None:
                        path.unlink(missing_ok=True)
                    else:
                        write(path, codec.archive([segment]))
                        sources.add(part, own, times)
                progress.update(len(chunk))
        unread = sum(gather_object([len(bad_images.seen)]))
        archive = None
        if state.is_main_process:
            found = [archive for path in paths if (archive := own_archive(path, codec)) is not None]
            segments = tuple(segment for one in found for segment in one.segments)
            if not segments:
                raise UserError(f"none of the images of {source} can be read, see {out / BAD_FILES_NAME}; mend them")
            archive = LosslessArchive(codec.model, codec.shape, segments)
            data = codec.archive(segments)
            write(out / name, data)
            sources.add(name, files, before)
            remove_parts(out, sources)
        state.wait_for_everyone()
    if archive is None:
        return ""
    figures = figures_of([archive])
    bits = f"{8 * len(data) / figures.numbers:.4f} bits per dimension, {figures.bound_bits_each:.4f} by the ELBO"
    line = f"{counted(figures.images, 'image')} compressed to {counted(len(data), 'byte')} in {out / name}, {bits}"
    return line + (f"; {unread} could not be read, see {out / BAD_FILES_NAME}" if unread else "")


def own_archive(path: Path, codec: LosslessCodec) -> LosslessArchive | None:
    """What a whole file holds that this model wrote; None for another, or one that is damaged."""
    if not path.is_file():
        return None
    try:
        archive = read_lossless(path)
    except UserError:  # damaged by a power failure
        return None
    return archive if archive.model == codec.model and archive.shape == codec.shape else None


def read_and_coded(names: Sequence[str], root: Path, codec: LosslessCodec, bad_images: BadImages) -> Segment | None:
    """A segment of those of the images that can be read; None where none can. Raises UserError."""
    pixels, read = [], []
    for name in names:
        try:
            image = pixels_of_file(root / name, codec.shape.channels)
        except BadImageError as error:
            bad_images.add(str(root / name), str(error))
            continue
        codec.check_pixels(image[None], str(root / name))
        pixels.append(image)
        read.append(name)
    return codec.segment(np.stack(pixels), read) if read else None


def pixels_of_file(path: Path, channels: int) -> np.ndarray:
    """uint8 H W c, upright. Raises UserError for a picture whose pixels are others than 8-bit ones of so many channels,
    and BadImageError."""
    picture = open_upright(path, channels)
    with Image.open(path) as image:
        kind, deep = image.mode, any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        if kind not in MODES_OF.get(channels, ()) or deep or "transparency" in image.info:
            more = " of 16 bits" if deep else " with transparency" if "transparency" in image.info else ""
            raise UserError(
                f"{path} has pixels of mode {kind}{more}, expected {' or '.join(MODES_OF[channels])} of 8 bits without "
                "transparency, as this model knows them: another mode would not come back; convert such images first"
            )
    return to_array(picture)


def remove_parts(out: Path, sources: Sources) -> None:
    """When the archive holds all segments. For one process, when all are done."""
    shutil.rmtree(out / PARTS_NAME, ignore_errors=True)
    sources.forget(f"{PARTS_NAME}/")
    sources.finish()


def write(path: Path, data: bytes) -> None:
    """As a `quick_file`; its checksum tells a damaged one."""
    with quick_file(path) as temporary:
        temporary.write_bytes(data)
