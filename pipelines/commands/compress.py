"""`zellige compress`: images to `.zlg` files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate.utils import gather_object
from torch import Tensor

from common.errors import UserError
from common.files import remove_leftovers, write_json
from common.progress import progress_bar
from common.wording import counted
from images.files import MAX_BAD_SHARE, BadImageError, BadImages, open_upright
from pipelines.codec.archive import SUFFIX, Entry, read_archive
from pipelines.codec.codec import BATCH, LANES, PIXELS, Codec
from pipelines.devices import open_device
from pipelines.image_folders import BAD_FILES_NAME, image_names, to_images
from pipelines.labels import class_number
from pipelines.pictures import quick_file
from pipelines.settings import SETTINGS_NAME, check_settings

ARCHIVE_NAME = "images.zlg"


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Images as .zlg files, each as small as the model's prior is good."""

    model: str  # assembled model, or model or run folder of an autoencoder, or a hub id
    images: str  # folder of images, or one image file
    out: str  # folder for the .zlg files
    mode: Literal["prior", "table", "packed"] | None = None  # left out: the first of these that the model has
    archive: bool = False  # all images in one file, images.zlg, from which each can be read by itself
    label: int | str | None = None  # class of all images, by number or name, which the prior is told; left out: any
    lanes: int = LANES  # images that the prior codes at once; a single one costs as much as all of them
    batch_size: int = BATCH  # images that are read and encoded at a time, fewer where they are large
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}, expected at least 1 image")


def compress_files(config: CompressConfig) -> str:
    """Writes one .zlg file an image, under the image's own name, or one archive; returns one line. What an earlier run
    wrote is kept. Raises UserError for a mode that the model does not have, a folder without images, one that was begun
    with other settings, and when more images than `config.max_bad_share` cannot be read."""
    state, device = open_device(config.device)
    source, out = Path(config.images), Path(config.out)
    names = image_names(source)
    codec = Codec.from_pretrained(config.model).to(device)
    label = class_number(codec.prior.class_names if codec.prior is not None else None, config.label)
    mode = codec.check_mode(config.mode, [label], config.lanes)
    settings = {
        "model": codec.stage1.hex(),
        "prior": codec.prior_fingerprint and codec.prior_fingerprint.hex(),
        "tables": codec.tables_fingerprint and codec.tables_fingerprint.hex(),
        "images": str(source.resolve()),
        "mode": mode.name,
        "archive": config.archive,
        "label": label,
        "lanes": config.lanes,
    }
    check_settings(out, settings, f"*{SUFFIX}")
    targets = zlg_names(names)
    if state.is_main_process:
        for folder in {(out / target).parent for target in targets.values()}:
            remove_leftovers(folder)
        write_json(out / SETTINGS_NAME, settings)
    state.wait_for_everyone()  # the leftovers are gone before one writes

    root = source if source.is_dir() else source.parent
    bad_images = BadImages(len(names), out / BAD_FILES_NAME, max_share=config.max_bad_share, option="--max_bad_share")
    archived: dict[int, Entry] = {}
    made: Counter[str] = Counter()  # bytes, pixels, images
    notes: Counter[str] = Counter()
    if config.archive and set(names) <= archived_names(out / ARCHIVE_NAME):
        return f"{out / ARCHIVE_NAME} is there already"
    mine = list(enumerate(names))[state.process_index :: state.num_processes]
    todo = [(i, name) for i, name in mine if config.archive or not is_sound(out / targets[name])]
    with progress_bar(len(todo), "images", shown=state.is_main_process) as progress:
        for numbers, images, read in read_parts(todo, root, codec.autoencoder.channels, config.batch_size, bad_images):
            entries, said = codec.entries(images, numbers, config.mode, [label] * len(images), config.lanes)
            notes.update(said)
            for number, entry in zip(numbers, entries, strict=True):
                if config.archive:
                    archived[number] = entry._replace(name=names[number])
                else:
                    data = codec.archive([entry], config.lanes)
                    write_bytes(out / targets[names[number]], data)
                    made.update(bytes=len(data), pixels=entry.shape.height * entry.shape.width, images=1)
            progress.update(read)
    if config.archive:
        everything = {number: entry for part in gather_object([archived]) for number, entry in part.items()}
        if state.is_main_process and everything:
            data = codec.archive([everything[i] for i in sorted(everything)], config.lanes)
            write_bytes(out / ARCHIVE_NAME, data)
            pixels = sum(entry.shape.height * entry.shape.width for entry in everything.values())
            made.update(bytes=len(data), pixels=pixels, images=len(everything))
    else:
        made = sum(gather_object([made]), Counter())
    notes = sum(gather_object([notes]), Counter())
    unread = sum(gather_object([len(bad_images.seen)]))
    where = out / ARCHIVE_NAME if config.archive else out
    bits = f", {8 * made['bytes'] / made['pixels']:.4f} bits per pixel" if made["pixels"] else ""
    kept = len(names) - made["images"] - unread
    return "; ".join(
        [
            f"{counted(made['images'], 'image')} compressed to {counted(made['bytes'], 'byte')} in {where}{bits}",
            *([f"{kept} were there already"] if kept else []),
            *([f"{unread} could not be read, see {out / BAD_FILES_NAME}"] if unread else []),
            *(note for note, _ in notes.most_common(3)),
            *([f"and {len(notes) - 3} such notes more"] if len(notes) > 3 else []),
        ]
    )


def zlg_names(names: Sequence[str]) -> dict[str, str]:
    """The file for each image: a.jpg becomes a.zlg, or a.jpg.zlg where another image would be a.zlg too."""
    short = {name: str(Path(name).with_suffix(SUFFIX)) for name in names}
    shared = Counter([*short.values(), *(f"{name}{SUFFIX}" for name in names)])
    return {name: target if shared[target] == 1 else f"{name}{SUFFIX}" for name, target in short.items()}


def is_sound(path: Path) -> bool:
    """Whether a whole .zlg file is there."""
    return bool(archived_names(path))


def archived_names(path: Path) -> set[str]:
    """The names of the images in a whole .zlg file; none where there is no such file."""
    try:
        return {entry.name for entry in read_archive(path.read_bytes()).entries}
    except (OSError, UserError):
        return set()


def write_bytes(path: Path, data: bytes) -> None:
    """As a `quick_file`; `is_sound` tells a damaged one."""
    with quick_file(path) as temporary:
        temporary.write_bytes(data)


def read_parts(
    todo: Sequence[tuple[int, str]], root: Path, channels: int, batch_size: int, bad_images: BadImages
) -> Iterator[tuple[list[int], list[Tensor], int]]:
    """Numbers and images, c H W each, that are coded together: up to `batch_size` and, but for a single one, up to
    PIXELS; and how many files were read for them."""
    numbers: list[int] = []
    images: list[Tensor] = []
    read = pixels = 0
    for number, name in todo:
        try:
            image = to_images(open_upright(root / name, channels))[0]
        except BadImageError as error:
            bad_images.add(str(root / name), str(error))
            read += 1
            continue
        own = image.shape[1] * image.shape[2]
        if images and (len(images) == batch_size or pixels + own > PIXELS):
            yield numbers, images, read
            numbers, images, read, pixels = [], [], 0, 0
        numbers.append(number)
        images.append(image)
        read, pixels = read + 1, pixels + own
    if read:
        yield numbers, images, read
