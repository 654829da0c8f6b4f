"""`zellige reconstruct`: images as their codes or latents tell them, beside the originals, with their PSNR."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from pipelines.captions import DecoderCaptions
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
from stage2_prior.text import captions_of

PSNR_NAME = "psnr.json"
SHEET_COLUMNS = 4
SHEET_IMAGES = 16
DEFAULTS = dict.fromkeys(("precision", "tokens", "grids", "prompt", "captions"))  # settings of earlier folders
SHEET_SIDE = 1024  # pixels: longer pictures are scaled down for the sheet


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Encodes and decodes images with the autoencoder of a model, each at its own size; with a VAE or a model of kind
    titok or flextok at that of the model, to which they are scaled and cut."""

    model: str  # assembled model, or model or run folder of an autoencoder or a VAE, or a hub id
    images: str  # folder of images, or one image file
    out: str  # folder for the PNG files, sheet.png and psnr.json
    max_side: int | None = None  # larger images are scaled down to this longer side; left out: none is
    tokens: int | None = None  # of each image, the first ones, of a model with nested tokens; left out: all
    grids: int | None = None  # of each image's codes, the first layers or scales alone; left out: all
    prompt: str | None = None  # what all images show, for a decoder that reads captions; left out: nothing is said
    captions: str | None = None  # what each shows: a file of captions, as train-stage2 has it, or `file-names`
    text_encoder: str | None = None  # folder or hub id of the captions' CLIP; left out: as the model records
    decoder_steps: int | None = None  # of a model of kind flow_decoder or flextok; left out: as its settings say
    decoder_guidance: float | None = None  # of a model of kind flextok, 1: none; left out: as its settings say
    alone: bool = False  # leave out the originals: else each file shows original and reconstruction side by side
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be
    precision: AnyPrecision | None = None  # what the decoder computes in, not the encoder; left out: as its weights are
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        check_max_side(self.max_side)
        if self.grids is not None and self.grids < 1:
            raise UserError(f"grids={self.grids}, expected at least 1, or leave it out for all")
        if self.grids is not None and self.tokens is not None:
            raise UserError(
                f"grids={self.grids} with tokens={self.tokens}: give one of them, tokens for a model of kind titok or "
                "flextok"
            )
        if self.prompt is not None and self.captions is not None:
            raise UserError(f"got a prompt and captions={self.captions}, expected one: of all images, or of each")
        if self.text_encoder is not None and self.prompt is None and self.captions is None:
            raise UserError(f"text_encoder={self.text_encoder} without a caption to read: give prompt or captions")


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
        for name in ("tokens", "grids", "decoder_steps", "decoder_guidance", "prompt", "captions"):
            if (given := getattr(config, name)) is not None:
                raise UserError(
                    f"{name}={given}, but {config.model} is a VAE: its latents are all of use, it decodes in one pass "
                    f"and reads no captions; leave {name} out"
                )
        model = decoder_of_vae(config.model, device, precision)
    else:
        model = decoder_of_codes(config, device, precision)
    source, out = Path(config.images), Path(config.out)
    root = source if source.is_dir() else source.parent
    check_apart(out, source)
    targets = target_names(image_names(source))
    texts = texts_of(config, list(targets))
    settings = {
        "model": model.fingerprint,
        "images": str(source.resolve()),
        "max_side": config.max_side,
        "alone": config.alone,
        "precision": precision,
        "tokens": config.tokens,
        "grids": config.grids,
        "prompt": config.prompt,
        "captions": None if config.captions is None else sha256_of_texts(texts),
    }
    sources = Sources(out)
    files = {target: [root / name] for name, target in targets.items()}
    moved = {"images": lambda: sources.are_at(files)}
    with results_folder(out, "reconstruct", settings, state, defaults=DEFAULTS, may_change=moved):
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
                reconstruction = to_pil(model.reconstruct(to_images(original), texts.get(name))[0])
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
    reconstruct: Callable[[Tensor, str | None], Tensor]  # 1 c H W in [-1, 1], and its caption, to the same shape


def texts_of(config: ReconstructConfig, names: Sequence[str]) -> dict[str, str]:
    """The caption of each image that has one. Raises UserError for a file that lacks one."""
    if config.captions is not None:
        return {name: captions[0] for name, captions in zip(names, captions_of(config.captions, names), strict=True)}
    return {} if config.prompt is None else dict.fromkeys(names, config.prompt)


def sha256_of_texts(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def decoder_of_codes(config: ReconstructConfig, device: torch.device, precision: Precision | None) -> Reconstructor:
    """Raises UserError for a number of tokens, grids or steps that the model does not have, and for captions that it
    does not read."""
    autoencoder = load_autoencoder(config.model).to(device)
    if config.decoder_steps is not None:
        autoencoder.decode_in_steps(config.decoder_steps)
    if config.decoder_guidance is not None:
        autoencoder.decode_guided(config.decoder_guidance)
    if config.tokens is not None:
        autoencoder.prefix_spec(config.tokens)
    if config.grids is not None and config.grids > (count := len(autoencoder.code_spec().grids)):
        raise UserError(f"grids={config.grids}, expected 1 to {count}: {autoencoder.code_spec().describe()}")
    captions = DecoderCaptions(autoencoder)
    if config.prompt is not None or config.captions is not None:
        captions.load(config.text_encoder)

    def decode(images: Tensor, caption: str | None) -> Tensor:
        text = captions.of(None if caption is None else [caption])
        return reconstruct(autoencoder, images, precision, config.tokens, config.grids, text)

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
        lambda images, _: pipeline.reconstruct(images, precision=precision),
    )


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
