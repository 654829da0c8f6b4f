"""`zellige compress`: images to `.zlg` files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from accelerate.utils import gather_object
from torch import Tensor

from common.errors import UserError
from common.processes import on_main_process
from common.progress import progress_bar
from common.sources import Sources, times_of
from common.wording import counted
from images.files import BAD_FILES_NAME, MAX_BAD_SHARE, BadImageError, BadImages, open_upright
from pipelines.codec.archive import SUFFIX, VERSION, Mode, read_archive
from pipelines.codec.codec import BATCH, PIXELS, Codec, ModeName
from pipelines.codec.image_codes import OF_OTHER_SIZE, sentences
from pipelines.codec.parts import Parts
from pipelines.devices import open_device
from pipelines.image_folders import (
    check_max_side,
    image_names,
    scale_within,
    to_images,
)
from pipelines.image_input import fit
from pipelines.labels import class_number
from pipelines.latents.models import is_vae
from pipelines.pictures import quick_file
from pipelines.settings import recorded_settings, results_folder

ARCHIVE_NAME = "images.zlg"


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Images as .zlg files, each as small as the model's prior is good."""

    model: str  # assembled model, or model or run folder of an autoencoder, or a hub id
    images: str  # folder of images, or one image file
    out: str  # folder for the .zlg files
    # Left out where `out` holds files already: as these. lossless, with a VAE, is for 8-bit images of its own size.
    mode: Literal["prior", "table", "packed", "lossless"] | None = None  # left out: the first that the model has
    archive: bool = False  # all images in one file, images.zlg, from which each can be read by itself
    label: int | str | None = None  # class of all images, by number or name, which the prior is told; left out: any
    crop: bool = False  # scale and cut each image to the model's own size, the only one that its prior codes
    max_side: int | None = None  # larger images are scaled down to this longer side; left out: none is
    tokens: int | None = None  # of each image, the first ones, of a model with nested tokens; left out: all
    batch_size: int = BATCH  # images that are read and encoded at a time, fewer where they are large
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}, expected at least 1 image")
        check_max_side(self.max_side)
        if self.crop and self.max_side is not None:
            raise UserError(
                f"got crop with max_side={self.max_side}, expected either: crop gives all images the model's own size"
            )


def compress_files(config: CompressConfig) -> str:
    """Writes one .zlg file an image, under the image's own name, or one archive; returns one line. What an earlier run
    made of the images as they are now is kept. Raises UserError for a mode that the model does not have, a folder
    without images, one that was begun with other settings or by another command, and when more images than
    `config.max_bad_share` cannot be read."""
    if config.mode == "lossless" or is_vae(config.model):
        return compress_vae(config)
    state, device = open_device(config.device)
    source, out = Path(config.images), Path(config.out)
    root = source if source.is_dir() else source.parent
    names = image_names(source)
    codec = Codec.from_pretrained(config.model).to(device)
    label = class_number(codec.prior.class_names if codec.prior is not None else None, config.label)
    begun = recorded_settings(out, f"*{SUFFIX}")
    asked: ModeName | None = config.mode or begun.get("mode")
    mode = codec.check_mode(asked, [label])
    if config.tokens is not None:
        codec.autoencoder.prefix_spec(config.tokens)  # raises UserError where there are none, or not so many
    settings = {
        "model": codec.stage1.hex(),
        "prior": codec.prior_fingerprint and codec.prior_fingerprint.hex(),
        "tables": codec.tables_fingerprint and codec.tables_fingerprint.hex(),
        "images": str(source.resolve()),
        "mode": mode.name,
        "archive": config.archive,
        "label": label,
        "crop": config.crop,
        "max_side": config.max_side,
        "tokens": config.tokens,
    }
    targets = dict.fromkeys(names, ARCHIVE_NAME) if config.archive else zlg_names(names)
    files: dict[str, list[Path]] = {}
    for name, target in targets.items():
        files.setdefault(target, []).append(root / name)
    sources = Sources(out)
    old_names = [fingerprint and fingerprint.hex() for fingerprint in codec.version1_fingerprints] if begun else []
    may_change = {
        # A folder that version 1 of the format was written to names the models by other fingerprints.
        "model": lambda: begun.get("model") in old_names,
        "prior": lambda: mode != Mode.prior or begun.get("prior") in old_names,
        "images": lambda: sources.are_at(files),
        # What was written without tables needs none.
        "tables": lambda: mode == Mode.packed or begun.get("tables") is None,
    }
    opened = results_folder(
        out,
        "compress",
        settings,
        state,
        defaults={"crop": False, "max_side": None, "tokens": None, "lanes": begun.get("lanes")},
        may_change=may_change,
        results=f"*{SUFFIX}",
    )
    with opened:
        parts = Parts(out, root, codec, sources, state.process_index)
        before = None
        if config.archive:
            before = times_of(files[ARCHIVE_NAME])  # first of all: what changes from now on may be in it as it was
            archived_before = archived_names(out / ARCHIVE_NAME)
            current = bool(archived_before) and sources.is_current(ARCHIVE_NAME, files[ARCHIVE_NAME])
            if current and set(names) <= archived_before:
                if state.is_main_process:  # what a run left that was killed as it ended
                    parts.remove()
                    sources.finish()
                return f"{out / ARCHIVE_NAME} is there already"
            parts.take_up(out / ARCHIVE_NAME if current else None)
            state.wait_for_everyone()  # before anyone adds to them
        spec = codec.autoencoder.code_spec()
        size = (spec.image_height, spec.image_width) if config.crop else None
        bad_images = BadImages(
            len(names), out / BAD_FILES_NAME, max_share=config.max_bad_share, option="--max_bad_share"
        )
        on_main_process(state, lambda: bad_images.keep_only([str(root)]))
        made: Counter[str] = Counter()  # bytes, pixels, images
        fallbacks: Counter[str] = Counter()
        mine = list(enumerate(names))[state.process_index :: state.num_processes]

        def is_there(name: str) -> bool:
            if config.archive:
                return name in parts.entries
            return is_sound(out / targets[name]) and sources.is_current(targets[name], [root / name])

        todo = [(number, name) for number, name in mine if not is_there(name)]

        def read(name: str) -> Tensor:
            picture = open_upright(root / name, codec.autoencoder.channels)
            return to_images(scale_within(picture, config.max_side) if size is None else fit(picture, *size))[0]

        with progress_bar(len(todo), "images", shown=state.is_main_process) as progress:
            for part in read_parts(todo, root, read, config.batch_size, bad_images):
                images = [one.image for one in part.images]
                entries, said = codec.entries(images, asked, [label] * len(images), config.tokens)
                fallbacks.update(said)
                if config.archive:
                    named = [e._replace(name=names[one.number]) for e, one in zip(entries, part.images, strict=True)]
                    parts.add(named, [one.times for one in part.images])
                    progress.update(part.files)
                    continue
                for one, entry in zip(part.images, entries, strict=True):
                    name = names[one.number]
                    data = codec.archive([entry])
                    write_bytes(out / targets[name], data)
                    sources.add(targets[name], [root / name], one.times)
                    made.update(bytes=len(data), pixels=entry.shape.height * entry.shape.width, images=1)
                progress.update(part.files)
        if config.archive:
            archived = {name: entry for own in gather_object([parts.entries]) for name, entry in own.items()}
            if state.is_main_process and archived:
                entries = [archived[name] for name in names if name in archived]
                data = codec.archive(entries)
                write_bytes(out / ARCHIVE_NAME, data)
                sources.add(ARCHIVE_NAME, files[ARCHIVE_NAME], before)
                parts.remove()
                pixels = sum(entry.shape.height * entry.shape.width for entry in entries)
                made.update(bytes=len(data), pixels=pixels, images=len(entries))
        else:
            made = sum(gather_object([made]), Counter())
        fallbacks = sum(gather_object([fallbacks]), Counter())
        unread = sum(gather_object([len(bad_images.seen)]))
        if state.is_main_process:
            sources.finish()
    where = out / ARCHIVE_NAME if config.archive else out
    bits = f", {8 * made['bytes'] / made['pixels']:.4f} bits per pixel" if made["pixels"] else ""
    kept = len(names) - made["images"] - unread
    hint = f"; --crop cuts all images to {spec.image_height}x{spec.image_width}" if OF_OTHER_SIZE in fallbacks else ""
    return (
        "; ".join(
            [
                counted(made["images"], "image")
                + (f" compressed to {counted(made['bytes'], 'byte')}" if made["images"] else "")
                + f" in {where}{bits}",
                *([f"{kept} were there already"] if kept else []),
                *([f"{unread} could not be read, see {out / BAD_FILES_NAME}"] if unread else []),
                *sentences(fallbacks, spec, codec.tables is not None),
            ]
        )
        + hint
    )


def compress_vae(config: CompressConfig) -> str:
    """As `compress_files`, without loss. Raises UserError for what a lossless file cannot be made of."""
    if config.mode not in (None, "lossless"):
        raise UserError(f"mode={config.mode}, but {config.model} is a VAE, which has no codes; take mode lossless")
    if not is_vae(config.model):
        raise UserError(
            f"mode=lossless, but {config.model} is no VAE, whose likelihood it takes; name one that "
            "`zellige train-vae` wrote, or take another mode"
        )
    if not config.archive:
        raise UserError(
            "mode=lossless writes one archive, whose images pay for each other's latents; give --archive true"
        )
    for name in ("crop", "max_side", "label", "tokens"):
        if (value := getattr(config, name)) is not None and value is not False:
            raise UserError(f"mode=lossless with {name}, expected images as they are; leave {name} out")
    from pipelines.lossless_files import compress_losslessly  # what nobody else needs

    return compress_losslessly(
        config.model, config.images, Path(config.out), ARCHIVE_NAME, config.max_bad_share, config.device
    )


def zlg_names(names: Sequence[str]) -> dict[str, str]:
    """The file for each image: a.jpg becomes a.zlg, or a.jpg.zlg where another image would be a.zlg too."""
    short = {name: str(Path(name).with_suffix(SUFFIX)) for name in names}
    shared = Counter([*short.values(), *(f"{name}{SUFFIX}" for name in names)])
    return {name: target if shared[target] == 1 else f"{name}{SUFFIX}" for name, target in short.items()}


def is_sound(path: Path) -> bool:
    """Whether a whole .zlg file is there that any machine decodes."""
    return bool(archived_names(path))


def archived_names(path: Path) -> set[str]:
    """The names of the images in a whole .zlg file; none where there is no such file, nor in one of version 1 that a
    prior coded: other machines could not decode it."""
    try:
        archive = read_archive(path.read_bytes())
    except (OSError, UserError):
        return set()
    lasting = archive.version == VERSION or all(entry.mode != Mode.prior for entry in archive.entries)
    return {entry.name for entry in archive.entries} if lasting else set()


def write_bytes(path: Path, data: bytes) -> None:
    """As a `quick_file`; `is_sound` tells a damaged one."""
    with quick_file(path) as temporary:
        temporary.write_bytes(data)


class ReadImage(NamedTuple):
    number: int
    image: Tensor  # c H W
    times: str  # of its file before it was read


class Part(NamedTuple):
    """Images that are coded together."""

    images: list[ReadImage]
    files: int  # that were read for them, those that could not be among them


def read_parts(
    todo: Sequence[tuple[int, str]],
    root: Path,
    read: Callable[[str], Tensor],
    batch_size: int,
    bad_images: BadImages,
) -> Iterator[Part]:
    """Numbered images, as `read` gives them by their names, in parts of up to `batch_size` and, but for a single one,
    up to PIXELS."""
    images: list[ReadImage] = []
    files = pixels = 0
    for number, name in todo:
        times = times_of([root / name])
        try:
            image = read(name)
        except BadImageError as error:
            bad_images.add(str(root / name), str(error))
            files += 1
            continue
        own = image.shape[1] * image.shape[2]
        if images and (len(images) == batch_size or pixels + own > PIXELS):
            yield Part(images, files)
            images, files, pixels = [], 0, 0
        images.append(ReadImage(number, image, times))
        files, pixels = files + 1, pixels + own
    if files:
        yield Part(images, files)
