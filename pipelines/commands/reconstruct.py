"""`zellige reconstruct`: images as their codes or latents tell them, beside the originals, with their PSNR."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from common.computing import check_device
from common.errors import UserError
from common.files import write_json
from common.owned_folder import SHEET_NAME
from common.precision import AnyPrecision, Precision
from common.processes import on_main_process
from common.progress import with_progress
from common.sources import Sources, times_of
from common.wording import counted
from images.files import BAD_FILES_NAME, MAX_BAD_SHARE, BadImageError, BadImages, open_upright
from metrics.similarity import decibels
from pipelines.any_size import reconstruct
from pipelines.devices import open_device
from pipelines.image_folders import (
    check_max_side,
    image_names,
    scale_within,
    target_names,
    to_images,
)
from pipelines.image_input import fit
from pipelines.latents.models import is_vae
from pipelines.latents.pipeline import LatentPipeline
from pipelines.pictures import contact_sheet, in_columns, is_complete_png, save_png, side_by_side, to_pil
from pipelines.sampling_options import chosen_precision
from pipelines.settings import check_apart, results_folder
from pipelines.stages import load_autoencoder

PSNR_NAME = "psnr.json"
SHEET_COLUMNS = 4
SHEET_IMAGES = 16
SHEET_SIDE = 1024  # pixels: longer pictures are scaled down for the sheet


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Encodes and decodes images with the autoencoder of a model, each at its own size; with a VAE or a model of kind
    titok at that of the model, to which they are scaled and cut."""

    model: str  # assembled model, or model or run folder of an autoencoder or a VAE, or a hub id
    images: str  # folder of images, or one image file
    out: str  # folder for the PNG files, sheet.png and psnr.json
    max_side: int | None = None  # larger images are scaled down to this longer side; left out: none is
    tokens: int | None = None  # of each image, the first ones, of a model with nested tokens; left out: all
    decoder_steps: int | None = None  # of a model of kind flow_decoder; left out: as many as its settings say
    alone: bool = False  # leave out the originals: else each file shows original and reconstruction side by side
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be
    precision: AnyPrecision | None = None  # what the decoder computes in, not the encoder; left out: as its weights are
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        check_max_side(self.max_side)


def reconstruct_files(config: ReconstructConfig) -> str:
    """Writes one PNG file an image, under the image's own name; returns one line: what was made and where.

    PSNR, in decibels, is that of the 8-bit images, scaled down if so asked for. What an earlier run made of the
    images as they are now is kept. Raises UserError for a folder without images, for one begun with other settings or
    by another command, and when more images than `config.max_bad_share`
    cannot be read.
    """
    state, device = open_device(config.device)
    precision = chosen_precision(config.precision)
    check_device(device, precision)
    if is_vae(config.model):
        if config.tokens is not None:
            raise UserError(f"tokens={config.tokens}, but {config.model} is a VAE, whose latents are all of use")
        if config.decoder_steps is not None:
            raise UserError(
                f"decoder_steps={config.decoder_steps}, but {config.model} is a VAE, which decodes in one pass; leave "
                "it out"
            )
        model = decoder_of_vae(config.model, device, precision)
    else:
        model = decoder_of_codes(config.model, device, precision, config.tokens, config.decoder_steps)
    source, out = Path(config.images), Path(config.out)
    root = source if source.is_dir() else source.parent
    check_apart(out, source)
    targets = target_names(image_names(source))
    settings = {
        "model": model.fingerprint,
        "images": str(source.resolve()),
        "max_side": config.max_side,
        "alone": config.alone,
        "precision": precision,
        "tokens": config.tokens,
    }
    sources = Sources(out)
    files = {target: [root / name] for name, target in targets.items()}
    moved = {"images": lambda: sources.are_at(files)}
    with results_folder(
        out, "reconstruct", settings, state, defaults={"precision": None, "tokens": None}, may_change=moved
    ):
        bad_images = BadImages(
            len(targets), out / BAD_FILES_NAME, max_share=config.max_bad_share, option="--max_bad_share"
        )
        on_main_process(state, lambda: bad_images.keep_only([str(root)]))
        psnr: dict[str, float | None] = {}
        mine = list(targets.items())[state.process_index :: state.num_processes]
        for name, target in with_progress(mine, "images", shown=state.is_main_process):
            times = times_of(files[target])
            try:
                original = model.seen(scale_within(open_upright(root / name, model.channels), config.max_side))
            except BadImageError as error:
                bad_images.add(str(root / name), str(error))
                continue
            if not (is_complete_png(out / target) and sources.is_current(target, files[target])):
                reconstruction = to_pil(model.reconstruct(to_images(original))[0])
                save_png(reconstruction if config.alone else side_by_side(original, reconstruction), out / target)
                sources.add(target, files[target], times)
            with Image.open(out / target) as written:
                reconstruction = written if config.alone else written.crop((original.width, 0, *written.size))
                psnr[target] = decibels(np.asarray(original), np.asarray(reconstruction))
        psnr = dict(sorted(item for part in gather_object([psnr]) for item in part.items()))
        mean = mean_of([value for value in psnr.values() if value is not None])
        if state.is_main_process:
            sources.finish()
            write_json(out / PSNR_NAME, {**settings, "mean_psnr": mean, "psnr": psnr})
            first = [scale_within(Image.open(out / name), SHEET_SIDE) for name in list(psnr)[:SHEET_IMAGES]]
            save_png(contact_sheet(in_columns(first, SHEET_COLUMNS)), out / SHEET_NAME)
    unread = len(targets) - len(psnr)
    return (
        f"{counted(len(psnr), 'image')} in {out}, mean PSNR {mean:.2f} dB; the first are on {out / SHEET_NAME}, "
        f"each image's PSNR in {out / PSNR_NAME}"
        + (f"; {unread} could not be read, see {out / BAD_FILES_NAME}" if unread else "")
    )


class Reconstructor(NamedTuple):
    """A model that images go through."""

    fingerprint: str
    channels: int
    seen: Callable[[Image.Image], Image.Image]  # what it sees of a picture: all of it, or as much as has its size
    reconstruct: Callable[[Tensor], Tensor]  # 1 c H W in [-1, 1], to the same shape


def decoder_of_codes(
    name: str, device: torch.device, precision: Precision | None, tokens: int | None, steps: int | None
) -> Reconstructor:
    """Raises UserError for a number of tokens or steps that the model does not have."""
    autoencoder = load_autoencoder(name).to(device)
    if steps is not None:
        autoencoder.decode_in_steps(steps)
    if tokens is not None:
        autoencoder.prefix_spec(tokens)
    decode = partial(reconstruct, autoencoder, precision=precision, tokens=tokens)

    def seen(picture: Image.Image) -> Image.Image:
        return picture if autoencoder.codes_have_places else fit(picture, *autoencoder.image_size)

    return Reconstructor(autoencoder.fingerprint(), autoencoder.channels, seen, decode)


def decoder_of_vae(name: str, device: torch.device, precision: Precision | None) -> Reconstructor:
    pipeline = LatentPipeline.from_pretrained(name).to(device)
    pipeline.check_precision(precision)
    vae = pipeline.vae
    return Reconstructor(
        vae.fingerprint(),
        vae.config.channels,
        lambda picture: fit(picture, *vae.image_size),
        partial(pipeline.reconstruct, precision=precision),
    )


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
