"""`zellige decompress`: `.zlg` files to images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object
from torch import Tensor

from common.errors import UserError
from common.file_names import is_below
from common.progress import progress_bar
from common.sources import Sources, times_of
from common.wording import counted
from pipelines.codec.archive import SUFFIX, Archive, Entry, Mode, arithmetic_of, open_archive
from pipelines.codec.codec import BATCH, MAX_PIXELS, Codec, grouped
from pipelines.codec.lossless_archive import is_lossless, open_lossless
from pipelines.codec.models import Models
from pipelines.devices import open_device
from pipelines.folder_kinds import compressed_files
from pipelines.image_folders import target_names
from pipelines.pictures import is_complete_png, save_png, to_picture, to_pil
from pipelines.settings import results_folder


@dataclass(frozen=True, kw_only=True)
class DecompressConfig:
    """Images of .zlg files, as PNG files."""

    files: str  # folder of .zlg files, or one of them
    out: str  # folder for the PNG files
    model: str | None = None  # the model that compressed them: assembled model, autoencoder or hub id
    models: str | None = None  # in place of model: a folder in which it is found by its fingerprint
    only: tuple[int, ...] | None = None  # of each file only images of these numbers, such as [0,99]; left out: all
    max_pixels: int = MAX_PIXELS  # of the images of a batch: files that claim more are refused
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if (self.model is None) == (self.models is None):
            raise UserError("expected one of --model MODEL and --models FOLDER, which holds the model")
        if self.max_pixels < 1:
            raise UserError(f"max_pixels={self.max_pixels}, expected at least 1")
        if self.only == ():
            raise UserError("only names no image, expected numbers such as [0,99]; leave it out for all images")


def decompress_files(config: DecompressConfig) -> str:
    """Writes a PNG file for each image; returns one line. What an earlier run made of the .zlg files as they are now is
    kept. Raises UserError for damaged files, when the others are written, for the first file of another model, and for
    an `out` that holds images of other files, or anything else."""
    state, device = open_device(config.device)
    source, out = Path(config.files), Path(config.out)
    root, files = (source, zlg_files(source)) if source.is_dir() else (source.parent, [source.name])
    models = Models(config.model, config.models, device)
    sources = Sources(out)
    moved = {"files": lambda: sources.are_at(files_of_images(root, files))}
    with results_folder(out, "decompress", {"files": str(source.resolve())}, state, may_change=moved):
        mine = files[state.process_index :: state.num_processes]
        folders = {folder for name in files for folder in Path(name).parents}
        written = kept = 0
        arithmetics: Counter[str] = Counter()  # of the images in mode prior
        failures: list[str] = []
        with progress_bar(len(mine), "files", shown=state.is_main_process) as progress:
            for start in range(0, len(mine), BATCH):
                part = mine[start : start + BATCH]
                todo: list[Wanted] = []
                for name in part:
                    times = times_of([root / name])
                    if is_lossless(root / name):
                        made, there = decompress_losslessly(
                            name, root, out, config.only, models, sources, folders, failures
                        )
                        written, kept = written + made, kept + there
                        continue
                    try:
                        found = images_in(root / name, config.only)
                    except UserError as error:
                        failures.append(str(error))
                        continue
                    wanted = wanted_of(name, found, root, models, folders, times)
                    missing = [
                        one
                        for one in wanted
                        if not (is_complete_png(out / one.target) and sources.is_current(one.target, [root / name]))
                    ]
                    kept += len(wanted) - len(missing)
                    todo += missing
                for batch in decoded_together(todo, config.max_pixels):
                    for image, one in decoded(batch, config.max_pixels, failures):
                        save_png(to_pil(image), out / one.target)
                        sources.add(one.target, [Path(one.title)], one.times)
                        written += 1
                        if one.entry.mode == Mode.prior:
                            arithmetics[arithmetic_of(one.archive)] += 1
                progress.update(len(part))
        written, kept = (sum(gather_object([number])) for number in (written, kept))
        failures = gather_object(failures)
        arithmetics = sum(gather_object([arithmetics]), Counter())
        if state.is_main_process:
            sources.finish()
    if failures:
        more = f" ({len(failures) - 1} more such failures)" if len(failures) > 1 else ""
        others = f"; {counted(written, 'other image')} written to {out}" if written else ""
        raise UserError(f"{failures[0]}{more}{others}")
    by_prior = [f"; {count} in mode prior, {arithmetic}" for arithmetic, count in arithmetics.items()]
    return (
        f"{counted(written, 'image')} in {out}" + (f"; {kept} were there already" if kept else "") + "".join(by_prior)
    )


def decompress_losslessly(
    name: str,
    root: Path,
    out: Path,
    only: Sequence[int] | None,
    models: Models,
    sources: Sources,
    folders: set[Path],
    failures: list[str],
) -> tuple[int, int]:
    """Writes the images of a file of mode lossless, or those of these numbers: how many, and how many were there. What
    is damaged is named in `failures`. Raises UserError for another model, and for names that lead elsewhere."""
    path, written = root / name, 0
    times = times_of([path])
    try:
        file = open_lossless(path)
    except UserError as error:
        failures.append(str(error))
        return 0, 0
    with file:
        codec = models.for_lossless(file)
        try:
            if only is None:
                file.check()
            names = list(file.names())
        except UserError as error:
            failures.append(str(error))
            return 0, 0
        targets = png_names(name, names, str(path))
        check_folder(name, targets, root, folders)
        numbers = list(range(file.count) if only is None else dict.fromkeys(only))
        todo = [
            number
            for number in numbers
            if not 0 <= number < file.count
            or not (is_complete_png(out / targets[number]) and sources.is_current(targets[number], [path]))
        ]
        try:
            for number, pixels in codec.images(file, todo):
                save_png(to_picture(pixels), out / targets[number])
                sources.add(targets[number], [path], times)
                written += 1
        except UserError as error:
            failures.append(str(error))
    return written, len(numbers) - len(todo)


def files_of_images(root: Path, files: Sequence[str]) -> dict[str, list[Path]]:
    """The file of each image, by the image's PNG file; damaged ones left out."""
    images: dict[str, list[Path]] = {}
    for name in files:
        opened = open_lossless if is_lossless(root / name) else open_archive
        with suppress(UserError), opened(root / name) as file:
            images |= {target: [root / name] for target in png_names(name, list(file.names()), name)}
    return images


class InFile(NamedTuple):
    """What was read of a file."""

    head: Archive  # without entries
    entries: list[Entry]
    numbers: Sequence[int]  # of these entries
    names: list[str]  # of all images


def images_in(path: Path, only: Sequence[int] | None) -> InFile:
    """The images of a file, or those of these numbers. Raises UserError for a damaged file; of one that is not read as
    a whole, for what is damaged of it."""
    with open_archive(path) as file:
        if only is None:
            file.check()
        numbers = range(file.count) if only is None else list(dict.fromkeys(only))
        return InFile(file.head, list(file.entries(numbers)), numbers, list(file.names()))


def wanted_of(name: str, found: InFile, root: Path, models: Models, folders: set[Path], times: str) -> list[Wanted]:
    """The images of a file; folders: in which there are others. Raises UserError."""
    title = str(root / name)
    codec = models.for_archive(found.head, title)
    targets = png_names(name, found.names, title)
    check_folder(name, targets, root, folders)
    pairs = zip(found.numbers, found.entries, strict=True)
    return [Wanted(codec, found.head, entry, targets[number], title, times) for number, entry in pairs]


def check_folder(name: str, targets: Sequence[str], root: Path, folders: set[Path]) -> None:
    """Raises UserError where the images of a file would go to a folder of others."""
    folder = Path(name).with_suffix("")
    if folder in folders and targets != [f"{folder}.png"]:
        raise UserError(
            f"the images of {root / name} and those of the files in {root / folder} would go to one folder; decompress "
            "them one after the other, each to its own --out"
        )


def decoded(batch: Sequence[Wanted], max_pixels: int, failures: list[str]) -> list[tuple[Tensor, Wanted]]:
    """Images of a batch; where one of them fails, those of the others, and a sentence in `failures`."""
    codec, archive, *_ = batch[0]
    try:
        images = codec.decode([one.entry for one in batch], archive, max_pixels, [one.title for one in batch])
        return list(zip(images, batch, strict=True))
    except UserError as error:
        if len(batch) == 1:
            failures.append(str(error))
            return []
    return [pair for one in batch for pair in decoded([one], max_pixels, failures)]


class Wanted(NamedTuple):
    """An image to be decoded."""

    codec: Codec
    archive: Archive
    entry: Entry
    target: str  # the PNG file, relative to the folder of all
    title: str  # of its file
    times: str  # of its file before it was read


def decoded_together(wanted: Sequence[Wanted], max_pixels: int) -> Iterator[list[Wanted]]:
    """Images of one model and version of the format, up to BATCH of them and `max_pixels`, or a single one."""
    alike = grouped(wanted, lambda one: (id(one.codec), one.archive[1:]))
    for group in alike.values():
        batch: list[Wanted] = []
        pixels = 0
        for one in group:
            own = one.codec.pixels_of(one.entry)
            if batch and (len(batch) == BATCH or pixels + own > max_pixels):
                yield batch
                batch, pixels = [], 0
            batch.append(one)
            pixels += own
        yield batch


def zlg_files(folder: Path) -> list[str]:
    """The .zlg files below a folder, relative to it. Raises UserError where there are none, or no finished ones."""
    names = sorted(str(path.relative_to(folder)) for path in compressed_files(folder))
    if not names:
        raise UserError(f"{folder} holds no {SUFFIX} files; name a folder that `zellige compress` wrote")
    return names


def png_names(file: str, own_names: Sequence[str], title: str) -> list[str]:
    """Where the images of a file go: a.zlg to a.png, those of an archive to a folder of its name. own_names: as the
    file has them. Raises UserError for a name that leads out of it."""
    stem = str(Path(file).with_suffix(""))
    if list(own_names) == [""]:
        return [f"{stem}.png"]
    names = [name or f"{number:06d}" for number, name in enumerate(own_names)]
    for name in names:
        if not is_below(name):
            raise UserError(
                f"{title} calls an image {name[:80]!r}, expected a path below one folder of this system; take "
                "`TwoStagePipeline.decompress`, which gives images without names, or delete it if you do not trust it"
            )
    targets = target_names(names)
    return [f"{stem}/{targets[name]}" for name in names]
