"""Images to code shards: streamed, by any number of processes, continued where it was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from codes.shard_folder import INDEX_NAME, Split
from codes.shards import CodeIndex, CodeShardWriter
from codes.spec import Codes
from common.errors import UserError
from common.files import remove_leftovers
from common.folder_lock import held
from common.model_io import load_pretrained, model_folder
from common.owned_folder import check_owner
from common.processes import on_main_process, process_state, use_device
from common.progress import progress_bar
from common.runs import RUN_CONFIG_NAME
from common.sources import Sources, times_of
from images.datasets import DataConfig, ImageDataset, image_datasets, to_float
from images.files import BAD_FILES_NAME
from images.sources import FileSource
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.autoencoders.base import Autoencoder
from training.data import Loader, explain_dead_workers
from training.launcher import check_launcher_of_models
from training.task import Batch

NO_CODE_DEPENDS_ON = ("aspect_buckets", "aspect_limit", "max_bad_share")  # of the data's fields


@dataclass(frozen=True, kw_only=True)
class EncodeDataConfig:
    """Which images to encode; what is not given is as the stage-one run had it."""

    path: str | None = None  # a folder of images, an .npz file or a name
    validation_path: str | None = None  # a source of held-out images; not taken over if `path` is another
    validation_share: float | None = None  # held out of the images of `path`, in place of those that the run held out
    image_size: int | tuple[int, int] | None = None  # pixels: side of a square, or (H, W)
    max_bad_share: float | None = None  # of the images may be unreadable; 0 stops at the first, else a few may be


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Turns images into code shards, with a trained autoencoder."""

    model: str  # stage-one run, its model folder, or a hub id; on the command line an assembled model too
    out: str  # folder for the code shards
    data: EncodeDataConfig = field(default_factory=EncodeDataConfig)
    augment_copies: int = 1  # codes of each training image: first as it is, then augmented as in the run
    seed: int = 0  # of the augmentation
    batch_size: int = 64  # images at a time
    shard_size: int = 8192  # images per file: what an interruption can cost each process
    workers: int = 2  # processes that read images ahead, for each encoding process
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        for name, least in (("augment_copies", 1), ("batch_size", 1), ("shard_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}, expected at least {least}")


def encode(config: EncodeConfig) -> str:
    """Does what the config says; returns one line that tells what was made and where. Raises UserError."""
    check_launcher_of_models()
    use_device(config.device)
    autoencoder = load_pretrained(config.model, AUTOENCODERS)
    data = data_config(config, autoencoder)
    out = Path(config.out)
    datasets = image_datasets(data, config.seed, bad_files=out / BAD_FILES_NAME)
    index = encode_images(
        autoencoder,
        *datasets,
        out,
        augment_copies=config.augment_copies,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        workers=config.workers,
    )
    left_out = config.augment_copies * len(datasets[0]) + len(datasets[1]) - sum(shard.images for shard in index.shards)
    return (
        f"{index.images('train')} training and {index.images('validation')} held-out images as "
        f"{index.code_spec.describe()}, {index.code_spec.bits_per_image:.0f} bits per image, in {out}"
        + (f"; {left_out} were left out as unreadable, see {out / BAD_FILES_NAME}" if left_out else "")
        + f"; next: zellige train-stage2 --config RECIPE --codes {out}"
    )


def data_config(config: EncodeConfig, autoencoder: Autoencoder) -> DataConfig:
    """The stage-one run's data config with the given fields in place of its own; all images at one size, as a prior's
    grid of codes has one. Raises UserError."""
    folder = model_folder(config.model)
    recorded = folder.parent / RUN_CONFIG_NAME
    given = {name: value for name, value in asdict(config.data).items() if value is not None}
    if folder.name == "model" and recorded.is_file():
        try:
            data = DataConfig(**yaml.safe_load(recorded.read_text(encoding="utf-8"))["data"])
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{recorded} does not say what the run was trained on ({error}); it is damaged") from error
        data = replace(data, aspect_buckets=0)
        if "path" in given and not same_path(given["path"], data.path):
            data = replace(data, validation_path=None, validation_count=None)
        if "validation_share" in given:  # the run's own choices would go before it
            data = replace(data, validation_path=None, validation_count=None)
    elif "path" in given:  # a model without its run
        data = DataConfig(image_size=autoencoder.image_size, channels=1 if autoencoder.channels == 1 else 3)
    else:
        raise UserError(f"{config.model} is a model without its run, which would tell its images: give --data.path")
    return replace(data, **given)


def same_path(one: str, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


class Piece(NamedTuple):
    """What becomes one shard: images [first, first + images) of a dataset, each with its draw number."""

    split: Split
    dataset: ImageDataset
    first: int
    images: int
    first_draw: int


class ReadableImages:
    """training.task.Dataset that leaves out what cannot be read, and says by "indices" what is in a batch."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        batch, found = self.dataset.fetch_readable(indices, draws)
        return {**batch, "indices": torch.tensor(found, dtype=torch.int64)}


def encode_images(
    autoencoder: Autoencoder,
    train: ImageDataset,
    validation: ImageDataset,
    out: Path,
    *,
    augment_copies: int = 1,
    batch_size: int = 64,
    shard_size: int = 8192,
    workers: int = 0,
) -> CodeIndex:
    """Writes the folder `out` of code shards, or what it lacks; the shards are dealt to the processes.

    An image meets the model in the same batch whatever the number of processes or restarts, so the files are
    the same byte for byte. Unreadable images are left out. A shard whose images have changed is made anew. Raises
    UserError, also for a folder of anything but code shards and for one that another job is writing to.
    """
    if augment_copies > 1 and train.augment_seed is None:
        raise UserError(
            f"augment_copies={augment_copies} asks for different copies of each image, but the stage-one run "
            "augments nothing: leave it at 1, or train with data.crop=random, data.flip or data.shift"
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
        writer = CodeShardWriter(
            out,
            autoencoder.code_spec(train.config.height, train.config.width),
            [piece.split for piece in pieces],
            class_names=train.class_names,
            stage1_fingerprint=autoencoder.fingerprint(),
            source={
                **{
                    f"data.{name}": value
                    for name, value in asdict(train.config).items()
                    if name not in NO_CODE_DEPENDS_ON
                },
                "train_images": train.fingerprint(),
                "validation_images": validation.fingerprint(),
                "shard_size": shard_size,
                "augment_copies": augment_copies,
                "augment_seed": train.augment_seed if augment_copies > 1 else None,
            },
            source_defaults={f"data.{name}": value for name, value in asdict(DataConfig()).items()},
            latents=autoencoder.scale_latents(),
        )
        sources, files = Sources(out), [files_of(piece) for piece in pieces]

        def missing_pieces() -> list[int]:
            """By number. It takes a while where images were copied: all of them are read."""
            missing = []
            with progress_bar(sum(piece.images for piece in pieces), "images", what="compared", delay=2) as progress:
                for number, piece in enumerate(pieces):
                    shard = writer.written(number)
                    if shard is None or not sources.is_current(shard.file, files[number]):
                        missing.append(number)
                    progress.update(piece.images)
            if missing:
                writer.reopen()
            return missing

        missing = on_main_process(state, missing_pieces)
        mine = missing[state.process_index :: state.num_processes]
        autoencoder = autoencoder.to(state.device).eval()
        total = sum(pieces[number].images for number in mine)
        with progress_bar(total, "images", shown=state.is_main_process) as progress:
            for number in mine:
                times = times_of(files[number])
                codes, labels, names = encode_piece(autoencoder, pieces[number], batch_size, workers, progress)
                writer.write(number, codes, labels, names)
                if files[number]:
                    sources.add(writer.plan.shards[number].file, files[number], times)
        state.wait_for_everyone()
        if state.is_main_process:
            sources.finish()
            writer.finish()
        state.wait_for_everyone()
    return CodeIndex.read(out / INDEX_NAME)


def files_of(piece: Piece) -> list[Path]:
    """The image files of a piece; none for images in arrays, whose pixels the source's fingerprint tells."""
    source = piece.dataset.source
    if not isinstance(source, FileSource):
        return []
    indices = piece.dataset.indices[piece.first : piece.first + piece.images]
    return [source.root / source.name(int(index)) for index in indices]


def cut_into_pieces(train: ImageDataset, validation: ImageDataset, augment_copies: int, shard_size: int) -> list[Piece]:
    """The shards to be: training images as they are, then their augmented copies, then held-out images."""
    plain = train.without_augmentation()
    parts: list[tuple[Split, ImageDataset, int]] = [("train", plain, 0)]
    parts += [("train", train, copy * len(train)) for copy in range(1, augment_copies)]
    parts += [("validation", validation, 0)]
    return [
        Piece(split, dataset, first, min(shard_size, len(dataset) - first), first_draw + first)
        for split, dataset, first_draw in parts
        for first in range(0, len(dataset), shard_size)
    ]


@torch.inference_mode()
def encode_piece(
    autoencoder: Autoencoder, piece: Piece, batch_size: int, workers: int, progress: tqdm
) -> tuple[Codes, Tensor, list[str]]:
    """Codes (one `b h w` per grid), labels (b) and names (b) of a piece's readable images, on the CPU."""
    samples = [(piece.first + offset, piece.first_draw + offset) for offset in range(piece.images)]
    requests = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    device = next(autoencoder.parameters()).device
    grids = autoencoder.code_spec(piece.dataset.config.height, piece.dataset.config.width).grids
    codes = [[torch.empty(0, grid.height, grid.width, dtype=torch.int64)] for grid in grids]
    indices: list[int] = []
    loader = Loader(ReadableImages(piece.dataset), requests, workers=workers, prefetch=2, device=device)
    with closing(loader), explain_dead_workers():
        for batch in loader:
            if len(batch["images"]):
                for parts, grid_codes in zip(codes, autoencoder.encode(to_float(batch["images"])), strict=True):
                    parts.append(grid_codes.cpu())
                indices += batch["indices"].tolist()
            progress.update(len(batch["images"]))
    labels = torch.from_numpy(piece.dataset.labels[indices])
    return tuple(map(torch.cat, codes)), labels, piece.dataset.names(indices)
