"""Images to shards, of codes or of latents: streamed, by any number of processes, continued where interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from common.computing import beside_workers
from common.errors import UserError
from common.files import atomic_file, remove_leftovers
from common.folder_lock import held
from common.model_io import model_folder
from common.owned_folder import check_owner
from common.processes import on_main_process, process_state
from common.progress import progress_bar
from common.runs import RUN_CONFIG_NAME
from common.safe_yaml import load_yaml
from common.short_repr import changes
from common.sources import Sources, added_beside, times_of
from common.wording import one_line
from images.datasets import DataConfig, ImageDataset
from training.data import Loader, Sample, explain_dead_workers
from training.task import Batch

CAPTIONS_NAME = "captions.jsonl"  # beside the shards, of sources that have captions

# Of the data's fields.
NOTHING_DEPENDS_ON = (
    "aspect_buckets",
    "aspect_limit",
    "labels_per_class",
    "labels_seed",
    "max_bad_share",
    "max_pixels",
    "relist",
)


@dataclass(frozen=True, kw_only=True)
class EncodeDataConfig:
    """Which images to encode; what is not given is as the stage-one run had it."""

    path: str | None = None  # a folder of images, an .npz file, tars, hf:NAME, or a name
    validation_path: str | None = None  # a source of held-out images; not taken over if `path` is another
    validation_share: float | None = None  # held out of the images of `path`, in place of those that the run held out
    image_size: int | tuple[int, int] | None = None  # pixels: side of a square, or (H, W)
    max_bad_share: float | None = None  # of the images may be unreadable; 0 stops at the first, else a few may be
    max_pixels: int | None = None  # of an image by its header; larger ones count as unreadable and are not decoded
    jpeg_margin: float | None = None  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves so many times what is needed
    relist: bool | None = None  # look into a large folder, or tars, anew, though they have not changed
    image_field: str | None = None  # which image of a sample: its ending in tars, its column of hf:
    label_field: str | None = None  # the column of classes of hf:


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Turns images into code shards, with a trained autoencoder, or into latent shards, with a trained VAE."""

    model: str  # stage-one run, its model folder, or a hub id; on the command line an assembled model too
    out: str  # folder for the shards
    data: EncodeDataConfig = field(default_factory=EncodeDataConfig)
    augment_copies: int = 1  # of each training image: first as it is, then augmented as in the run
    seed: int = 0  # of the augmentation
    batch_size: int = 64  # images at a time
    shard_size: int = 8192  # images per file: what an interruption can cost each process
    workers: int = 2  # processes that read images ahead, for each encoding process
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    __repr__ = changes

    def __post_init__(self) -> None:
        for name, least in (("augment_copies", 1), ("batch_size", 1), ("shard_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}, expected at least {least}")


def recorded_config(model: str | Path) -> dict[str, Any] | None:
    """What the run of a model was; None for a model without its run. Raises UserError."""
    folder = model_folder(model)
    recorded = folder.parent / RUN_CONFIG_NAME
    if folder.name != "model" or not recorded.is_file():
        return None
    try:
        config = load_yaml(recorded.read_text(encoding="utf-8"))
        DataConfig(**config["data"])
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{recorded} does not say what the run was trained on ({one_line(error)}); it is damaged: restore it, or "
            "delete it and name the images by --data.path"
        ) from error
    return dict(config)


def data_config(config: EncodeConfig, size: int | tuple[int, int], channels: int) -> DataConfig:
    """The stage-one run's data config with the given fields in place of its own; all images at one size, as a prior's
    grid of codes has one, and with all their labels. size, channels: of the images of a model without its run. Raises
    UserError."""
    run = recorded_config(config.model)
    given = {name: value for name, value in asdict(config.data).items() if value is not None}
    if run is not None:
        data = replace(DataConfig(**run["data"]), aspect_buckets=0, labels_per_class=None)
        if "path" in given and not same_path(given["path"], data.path):
            data = replace(data, validation_path=None, validation_count=None)
        if "validation_share" in given:  # the run's own choices would go before it
            data = replace(data, validation_path=None, validation_count=None)
    elif "path" in given:
        data = DataConfig(image_size=size, channels=1 if channels == 1 else 3)
    else:
        raise UserError(f"{config.model} is a model without its run, which would tell its images: give --data.path")
    return replace(data, **given)


def same_path(one: str, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


class Piece(NamedTuple):
    """What becomes one shard: images [first, first + images) of a dataset, each with its draw number."""

    split: Literal["train", "validation"]
    dataset: ImageDataset
    first: int
    images: int
    first_draw: int


class ReadableImages:
    """training.task.Dataset over several ones, behind one another, a batch of one at a time; leaves out what cannot be
    read, and says by "indices" what is in a batch, counted in its own dataset."""

    def __init__(self, datasets: Sequence[ImageDataset]):
        self.datasets = datasets
        self.starts = np.cumsum([0, *map(len, datasets)])  # of each dataset among all

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        which = int(np.searchsorted(self.starts, indices[0], side="right")) - 1
        batch, found = self.datasets[which].fetch_readable([i - int(self.starts[which]) for i in indices], draws)
        return {**batch, "indices": torch.tensor(found, dtype=torch.int64)}


class Writer(Protocol):
    """What writes the shards: a codes.shard_folder.ShardWriter."""

    @property
    def plan(self) -> Any: ...

    def written(self, number: int) -> Any: ...

    def write(self, number: int, encoded: Any, labels: Tensor, names: Sequence[str], /) -> None: ...

    def reopen(self) -> None: ...

    def finish(self) -> Any: ...


def write_shards(
    out: Path,
    train: ImageDataset,
    validation: ImageDataset,
    open_writer: Callable[[Sequence[Piece], dict[str, Any], dict[str, Any]], Writer],
    encode_piece: Callable[[Piece, PieceBatches], tuple[Any, Tensor, list[str]]],
    *,
    augment_copies: int = 1,
    batch_size: int = 64,
    shard_size: int = 8192,
    workers: int = 0,
) -> None:
    """Writes the folder `out` of shards, or what it lacks; the shards are dealt to the processes.

    open_writer: is given the pieces, which images they are of, and the defaults of what says so. encode_piece: what a
    shard holds of a piece's readable images, which it is given, with their labels (b) and names (b), on the CPU.
    workers: processes that read images ahead, the same ones for all shards. On a CPU the model leaves them their cores.

    An image meets the model in the same batch whatever the number of processes or restarts, so the files are
    the same byte for byte. Unreadable images are left out. A shard whose images have changed is made anew. Raises
    UserError, also for a folder of anything but shards and for one that another job is writing to.
    """
    if augment_copies > 1 and train.augment_seed is None:
        raise UserError(
            f"augment_copies={augment_copies} asks for different copies of each image, but the stage-one run "
            "augments nothing: leave it at 1, or train with data.crop=random or random_resized, data.flip or data.shift"
        )
    state = process_state()
    pieces = cut_into_pieces(train, validation, augment_copies, shard_size)
    with ExitStack() as stack:

        def open_folder() -> None:
            check_owner(out, "encode")
            stack.enter_context(held(out, "encode"))
            remove_leftovers(out)
            train.bad_images.keep_only([train.source.title, validation.source.title])

        on_main_process(state, open_folder)
        source = {
            **{f"data.{name}": value for name, value in asdict(train.config).items() if name not in NOTHING_DEPENDS_ON},
            "train_images": train.fingerprint(),
            "validation_images": validation.fingerprint(),
            "shard_size": shard_size,
            "augment_copies": augment_copies,
            "augment_seed": train.augment_seed if augment_copies > 1 else None,
        }
        writer = open_writer(pieces, source, {f"data.{name}": value for name, value in asdict(DataConfig()).items()})
        sources = Sources(out)

        def missing_pieces() -> list[int]:
            """By number. It takes a while where images were copied: all of them are read."""
            missing = []
            with progress_bar(sum(piece.images for piece in pieces), "images", what="compared", delay=2) as progress:
                for number, piece in enumerate(pieces):
                    shard = writer.written(number)
                    if shard is None or not sources.is_current(shard.file, files_of(piece)):
                        missing.append(number)
                    progress.update(piece.images)
            if missing:
                writer.reopen()
            return missing

        missing = on_main_process(state, missing_pieces)
        mine = missing[state.process_index :: state.num_processes]
        total = sum(pieces[number].images for number in mine)
        with (
            progress_bar(total, "images", shown=state.is_main_process) as progress,
            closing(PieceReader([pieces[number] for number in mine], batch_size, workers, state.device)) as reader,
            beside_workers(workers, state.device),
            added_beside(sources) as add,
        ):
            for number in mine:
                piece = pieces[number]
                writer.write(number, *encode_piece(piece, reader.batches(piece, progress)))
                times, files = reader.times.pop(0), files_of(piece)
                if files:
                    add(writer.plan.shards[number].file, files, times)
        state.wait_for_everyone()
        if state.is_main_process:
            sources.finish()
            writer.finish()
            write_captions(out / CAPTIONS_NAME, [train, validation])
        state.wait_for_everyone()


def write_captions(path: Path, datasets: Sequence[ImageDataset]) -> None:
    """What the sources of images say of them in words, as `train-stage2 --captions` reads it; no file where they say
    nothing."""
    lines = []
    for dataset in datasets:
        for index in map(int, dataset.indices):
            if (caption := dataset.source.caption(index)) is not None:
                line = {"file": dataset.source.name(index), "caption": caption}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if lines:
        with atomic_file(path) as temporary:
            temporary.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))


def files_of(piece: Piece) -> list[Path]:
    """The files of a piece's images; none where the source's fingerprint tells when these change."""
    return piece.dataset.source.files(piece.dataset.indices[piece.first : piece.first + piece.images].tolist())


def cut_into_pieces(train: ImageDataset, validation: ImageDataset, augment_copies: int, shard_size: int) -> list[Piece]:
    """The shards to be: training images as they are, then their augmented copies, then held-out images."""
    plain = train.without_augmentation()
    parts: list[tuple[Literal["train", "validation"], ImageDataset, int]] = [("train", plain, 0)]
    parts += [("train", train, copy * len(train)) for copy in range(1, augment_copies)]
    parts += [("validation", validation, 0)]
    return [
        Piece(split, dataset, first, min(shard_size, len(dataset) - first), first_draw + first)
        for split, dataset, first_draw in parts
        for first in range(0, len(dataset), shard_size)
    ]


PieceBatches = Iterator[tuple[Tensor, list[int]]]
"""A piece's readable images, uint8 b c H W on the device, and their numbers in its dataset, a batch at a time."""


class PieceReader:
    """Reads pieces, one after another, ahead of who asks for them, with the same processes for all: the first images of
    a piece are there when the one before it is encoded. Close it after use."""

    def __init__(self, pieces: Sequence[Piece], batch_size: int, workers: int, device: torch.device):
        self.batch_size = batch_size
        self.times: list[str] = []  # of the files of each piece, just before the first of them was asked for
        datasets = {id(piece.dataset): piece.dataset for piece in pieces}
        images = ReadableImages(list(datasets.values()))
        starts = dict(zip(datasets, images.starts.tolist(), strict=False))

        def requests() -> Iterator[list[Sample]]:
            for piece in pieces:
                self.times.append(times_of(files_of(piece)))
                first = starts[id(piece.dataset)] + piece.first
                for offset in range(0, piece.images, batch_size):
                    some = range(offset, min(offset + batch_size, piece.images))
                    yield [(first + i, piece.first_draw + i) for i in some]

        self.loader = Loader(images, requests(), workers=workers, prefetch=2, device=device)

    def batches(self, piece: Piece, progress: tqdm) -> PieceBatches:
        """Those of the next piece, all of which are to be taken."""
        with explain_dead_workers():
            for batch in islice(self.loader, -(-piece.images // self.batch_size)):
                if len(batch["images"]):
                    yield batch["images"], batch["indices"].tolist()
                progress.update(len(batch["images"]))

    def close(self) -> None:
        self.loader.close()


def left_out(encoded: int, train: ImageDataset, validation: ImageDataset, augment_copies: int, report: Path) -> str:
    """What a summary says of images that could not be read; nothing where there are none."""
    count = augment_copies * len(train) + len(validation) - encoded
    return f"; {count} were left out as unreadable, see {report}" if count else ""
