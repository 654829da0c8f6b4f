"""`zellige info`: what a `.zlg` file holds, and how good it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.wording import counted
from pipelines.codec.archive import SUFFIX, Archive, arithmetic_of, read_archive, read_file
from pipelines.codec.lossless_archive import LosslessArchive, is_lossless, read_lossless
from pipelines.codec.lossless_facts import figures_of, lines_of
from pipelines.folder_kinds import compressed_files, kind_of_folder

SHOWN_SHAPES = 5


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """What a .zlg file holds, how small it is, and how good; of a folder of them the same in sum."""

    file: str  # the .zlg file, or a folder of such files
    against: str | None = None  # the image it was made of: PSNR and SSIM; needs --model or --models
    model: str | None = None  # the model that compressed it
    models: str | None = None  # in place of model: a folder in which it is found by its fingerprint
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if self.model is not None and self.models is not None:
            raise UserError("expected one of --model MODEL and --models FOLDER, which holds the model; got both")
        if self.against is not None and self.model is None and self.models is None:
            raise UserError("against is given, but no model to decode the file with; give --model or --models")


def describe_file(config: InfoConfig) -> str:
    """Lines of text. Raises UserError when the file is damaged, or cannot be decoded where that is asked for."""
    path = Path(config.file)
    if path.is_dir():
        return describe_folder(path, config)
    if is_lossless(path):
        return describe_lossless(path, config)
    data = read_file(path)
    archive = read_archive(data, str(path))
    lines = describe(f"{path}: ", [archive], len(data))
    if config.model is None and config.models is None:
        return "\n".join(lines)
    from pipelines.codec.quality import with_model  # torch and the models, which take seconds, only here

    models = config.model, config.models
    return "\n".join([*lines, *with_model(data, str(path), models, config.against, config.device)])


def describe_folder(folder: Path, config: InfoConfig) -> str:
    """All .zlg files below a folder together. Raises UserError for a folder of something else, with the command that
    shows it, and for a damaged file."""
    paths = compressed_files(folder)
    if not paths:
        if kind := kind_of_folder(folder):
            raise UserError(f"{folder} is {kind.what}, expected a {SUFFIX} file or a folder of them; try: {kind.then}")
        raise UserError(f"{folder} holds no {SUFFIX} files; name a {SUFFIX} file or a folder of them")
    if config.model is not None or config.models is not None:
        raise UserError(f"{folder} is a folder: a model is held against one file; name a {SUFFIX} file in it")
    lossless = [path for path in paths if is_lossless(path)]
    lines = []
    if lossless:
        beginning = f"{folder}: {counted(len(lossless), 'file')}, "
        lines += lossless_lines(beginning, [read_lossless(path) for path in lossless], sizes_of(lossless))
    if others := [path for path in paths if path not in set(lossless)]:
        archives = [read_archive(read_file(path), str(path)) for path in others]
        lines += describe(f"{folder}: {counted(len(others), 'file')}, ", archives, sizes_of(others))
    return "\n".join(lines)


def describe_lossless(path: Path, config: InfoConfig) -> str:
    """Of a file of mode lossless. Raises UserError when it is damaged, or where its model is not there."""
    if config.against is not None:
        raise UserError(f"{path} is of mode lossless, whose images are what they were; leave against out")
    lines = lossless_lines(f"{path}: ", [read_lossless(path)], sizes_of([path]))
    if config.model is None and config.models is None:
        return "\n".join(lines)
    from pipelines.codec.quality import with_vae  # torch and the models, which take seconds, only here

    return "\n".join([*lines, with_vae(path, (config.model, config.models), config.device)])


def lossless_lines(beginning: str, archives: Sequence[LosslessArchive], size: int) -> list[str]:
    """What files hold together. size: their bytes."""
    found = figures_of(archives)
    return [
        f"{beginning}{counted(found.images, 'image')}, {counted(size, 'byte')} ({found.payload_bits // 8} of images), "
        f"{8 * size / found.pixels:.4f} bits per pixel",
        *lines_of(archives, size),
    ]


def sizes_of(paths: Sequence[Path]) -> int:
    """Bytes of files together."""
    return sum(path.stat().st_size for path in paths)


def describe(beginning: str, archives: Sequence[Archive], size: int) -> list[str]:
    """What files hold together. size: their bytes."""
    entries = [entry for archive in archives for entry in archive.entries]
    pixels = sum(entry.shape.height * entry.shape.width for entry in entries)
    payloads = sum(entry.bits for entry in entries)
    modes = Counter(entry.mode.name for entry in entries)
    shapes = Counter(entry.shape for entry in entries)
    of_mode = (f"{mode} ({number})" if len(modes) > 1 else mode for mode, number in modes.items())
    lines = [
        f"{beginning}{counted(len(entries), 'image')}, {counted(size, 'byte')} "
        f"({-(-payloads // 8)} of codes), {8 * size / pixels:.4f} bits per pixel",
        f"mode: {', '.join(of_mode)}",
    ]
    for shape, number in shapes.most_common(SHOWN_SHAPES):
        grids = " + ".join(f"{h}x{w} codes of {k}" for h, w, k in shape.grids)
        lines.append(f"{number} of {shape.height}x{shape.width} pixels: {grids}")
    if len(shapes) > SHOWN_SHAPES:
        lines.append(f"and images of {counted(len(shapes) - SHOWN_SHAPES, 'more size')}")
    lines += by_file("autoencoder", [archive.stage1.hex() for archive in archives])
    lines += by_file("prior", [f"{one.prior.hex()}, {arithmetic_of(one)}" for one in archives if one.prior])
    return lines + by_file("tables", [one.tables.hex() for one in archives if one.tables])


def by_file(what: str, values: Sequence[str]) -> list[str]:
    """A line for each of the values, with the number of files that have it where there are several."""
    files = Counter(values)
    return [
        f"{what}: {value}" + (f" ({counted(number, 'file')})" if len(files) > 1 else "")
        for value, number in files.items()
    ]
