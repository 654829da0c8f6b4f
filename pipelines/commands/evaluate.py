"""`zellige evaluate`: how good a model is on test images: what stage one keeps and how many bits stage two needs, or
how likely images are under a VAE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from codes.shards import CodeDataset
from codes.training_images import TrainingImages, hashes_of
from common.errors import UserError
from common.files import write_json
from common.progress import with_progress
from common.wording import counted
from images.datasets import DataConfig, ImageDataset, open_images, to_float
from images.files import MAX_BAD_SHARE
from images.quality import psnr
from pipelines.devices import open_device
from pipelines.figures import FEW, SSIM_WINDOW, bits_of_codes, entropy, frequency_bits, ssim, standard_error
from pipelines.latents.judging import DRAWS, Asked, binarisation_of, judge_vae
from pipelines.latents.models import is_vae, load_vae
from pipelines.stages import check_made_by
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.binarise import Binarisation

SHARED = 0.02  # of the images: beyond it they are no test images; a few have the codes of another by chance


@dataclass(frozen=True, kw_only=True)
class EvaluateDataConfig:
    """Which test images."""

    path: str  # a folder of images, an .npz file or a name such as cifar10
    split: Literal["train", "test"] = "test"  # of an .npz file or a named set; a folder has no such parts
    max_bad_share: float = MAX_BAD_SHARE  # of the images may be unreadable; 0 stops at the first, else a few may be


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Reconstruction and likelihood of a model on test images."""

    model: str  # assembled model, or a hub id
    data: EvaluateDataConfig
    codes: str | None = None  # code shards that the prior was trained on: what their frequencies alone would need
    num: int | None = None  # so many of the images, evenly spread; left out: all
    batch_size: int = 64  # images at a time
    out: str | None = None  # JSON file for the figures; left out: they are only printed
    draws: int | None = None  # of a VAE: of the latents of each image, for its log p; left out: 100
    seed: int = 0  # of a VAE: of these draws
    binarised: Binarisation | None = None  # of a VAE: how images are made black and white; left out: as in its training
    pictures: str | None = None  # of a VAE: folder for samples, reconstructions, latent walks; left out: none are made
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        for name in ("num", "batch_size", "draws"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}, expected at least 1")


def evaluate(config: EvaluateConfig) -> str:
    """Prints a line a figure and what a person should know of them, writes both to `config.out`, returns one line.
    Raises UserError."""
    _, device = open_device(config.device)
    if is_vae(config.model):
        return evaluate_vae(config, device)
    check_not_asked(config, ("draws", "seed", "binarised", "pictures"), "which is no VAE")
    pipeline = TwoStagePipeline.from_pretrained(config.model).to(device)
    training = None if config.codes is None else training_codes(config.codes, pipeline)
    dataset = images_to_evaluate(config.data, pipeline)
    count = len(dataset) if config.num is None else min(config.num, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    found = Figures(pipeline, training)
    starts = range(0, count, config.batch_size)
    for start in with_progress(starts, "images", size=lambda start: min(config.batch_size, count - start)):
        indices = chosen[start : start + config.batch_size]
        batch, read = dataset.fetch_readable(indices, indices)  # another in its place would count twice
        if read:
            found.add(to_float(batch["images"]).to(device), batch["labels"].to(device))
    if not found.images:
        raise UserError(f"none of the {count} images of {config.data.path} that were chosen can be read")
    figures, notes = {"model": config.model, "data": config.data.path, **found.means()}, found.notes()
    for name, value in figures.items():
        print(f"{name:<34}{value:.4f}" if isinstance(value, float) else f"{name:<34}{value}")
    for note in notes:
        print(note)
    if config.out is not None:
        write_json(Path(config.out), {**figures, "notes": notes})
    where = f", figures in {config.out}" if config.out else ""
    unread = dataset.bad_images.summary()
    return (
        f"{counted(found.images, 'image')}: PSNR {figures['psnr']:.2f} dB, "
        f"{figures['bits_per_code']:.3f} bits per code, "
        f"{figures['bits_per_pixel']:.4f} bits per pixel{where}" + (f"; {unread}" if unread else "")
    )


def evaluate_vae(config: EvaluateConfig, device: torch.device) -> str:
    check_not_asked(config, ("codes",), "a VAE, which has none")
    model = load_vae(config.model).to(device)
    how = binarisation_of(model, config.binarised)
    images = images_of_size(config.data, model.image_size, model.config.channels)
    asked = Asked(config.draws or DRAWS, config.batch_size, config.seed, config.out, config.pictures)
    if asked.pictures is not None and Path(asked.pictures).is_file():
        raise UserError(f"pictures={asked.pictures} is a file, expected a folder: name another")
    return judge_vae({"model": config.model, "data": config.data.path}, model, images, config.num, how, asked)


def check_not_asked(config: EvaluateConfig, names: Sequence[str], what: str) -> None:
    """Raises UserError for options that a model of this kind does not know."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise UserError(f"{field.name}={value}, expected it left out for {config.model}, {what}")


def training_codes(folder: str, pipeline: TwoStagePipeline) -> CodeDataset:
    """The training part of code shards. Raises UserError for codes of another model, and where there is none."""
    dataset = CodeDataset(folder, "train")
    check_made_by(dataset, pipeline.autoencoder)
    if not len(dataset):
        raise UserError(f"{folder} holds no training images; name the codes that the prior was trained on")
    return dataset


def images_to_evaluate(data: EvaluateDataConfig, pipeline: TwoStagePipeline) -> ImageDataset:
    """The images at the model's size, their classes numbered as the prior numbers them. Raises UserError."""
    spec = pipeline.prior.code_spec
    images = images_of_size(data, (spec.image_height, spec.image_width), spec.image_channels)
    source = images.source
    known = pipeline.class_names
    if source.labels is not None:
        names = source.class_names or ()
        if known is None or not set(names) <= set(known):
            source.labels = np.full(len(source), -1)  # other classes than the prior's: any class
        else:
            source.labels = np.array([known.index(name) for name in names])[source.labels]
    return ImageDataset(source, images.config)


def images_of_size(data: EvaluateDataConfig, size: tuple[int, int], channels: int) -> ImageDataset:
    """The images at this height and width. Raises UserError."""
    is_folder = Path(data.path).expanduser().is_dir()
    config = DataConfig(
        path=data.path,
        split="train" if is_folder else data.split,
        image_size=size,
        channels=1 if channels == 1 else 3,
        max_bad_share=data.max_bad_share,
    )
    return ImageDataset(open_images(config), config)


class Figures:
    """What test images gave, batch after batch."""

    def __init__(self, pipeline: TwoStagePipeline, training: CodeDataset | None = None) -> None:
        """training: codes that the prior was trained on."""
        self.pipeline = pipeline
        self.spec = pipeline.prior.code_spec
        self.training_counts = None if training is None else training.counts()
        self.known = pipeline.prior.training_images if training is None else TrainingImages.of(training)
        self.values: dict[str, list[Tensor]] = {}  # one number for each image, float64
        self.counts = [torch.zeros(grid.vocabulary, dtype=torch.int64) for grid in self.spec.grids]
        self.hashes: list[np.ndarray] = []  # of the images' codes

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor) -> None:
        """images: b c H W in [-1, 1], labels: b, below 0 where there is none; both on the pipeline's device."""
        codes = self.pipeline.encode(images)
        decoded = self.pipeline.decode(codes)
        bits = bits_of_codes(self.pipeline.prior, codes, labels)
        of_image = torch.stack([part.sum(dim=(1, 2)) for part in bits]).sum(0)  # b
        self._note("psnr", psnr((decoded - images).square().mean(dim=(1, 2, 3))))
        if (similarity := ssim(decoded, images)) is not None:
            self._note("ssim", similarity)
        self._note("bits", of_image)
        for grid, part in zip(self.spec.grids, bits, strict=True):
            self._note(f"bits {grid.name}", part.mean(dim=(1, 2)))
        if (decoder := self.pipeline.autoencoder.decoder_bits(images, codes)) is not None:
            self._note("two_stage", of_image + decoder)
        arrays = [grid.cpu().numpy() for grid in codes]
        if self.pipeline.tables is not None:
            for grid, array in zip(self.spec.grids, arrays, strict=True):
                cost = self.pipeline.tables.grids[grid.name].bits(array)
                self._note(f"tables {grid.name}", torch.from_numpy(cost).mean(dim=(1, 2)))
        for count, part in zip(self.counts, codes, strict=True):
            count += part.flatten().cpu().bincount(minlength=len(count))
        self.hashes.append(hashes_of(arrays))

    def _note(self, name: str, per_image: Tensor) -> None:
        self.values.setdefault(name, []).append(per_image.cpu().double())

    def trained_on(self) -> tuple[int, int]:
        """How many of the images the prior was trained on, of how many for which that can be told."""
        return (0, 0) if self.known is None else self.known.among(np.concatenate(self.hashes))

    @property
    def images(self) -> int:
        return sum(map(len, self.values.get("psnr", [])))

    def means(self) -> dict[str, Any]:
        """Means over the images: PSNR in dB; SSIM, where they are large enough; bits per code, of each grid too, per
        pixel and per image-dimension; where the decoder is a likelihood, the bits per dimension of both stages
        together, a bound on the image's own; shares of each grid's codes that occur; the bits per code of a prior that
        knows only frequencies: those in the training images, or else an estimate from these images; those of the
        model's tables; the share of images that the prior was trained on, where that can be told."""
        mean = {name: float(torch.cat(parts).mean()) for name, parts in self.values.items()}
        spec = self.spec
        figures: dict[str, Any] = {"images": self.images, "psnr": mean["psnr"]}
        if "ssim" in mean:
            figures["ssim"] = mean["ssim"]
        figures["bits_per_code"] = mean["bits"] / spec.codes_per_image
        if len(spec.grids) > 1:
            figures |= {f"bits_per_code_{word(g.name)}": mean[f"bits {g.name}"] for g in spec.grids}
        figures["bits_per_pixel"] = mean["bits"] / (spec.image_height * spec.image_width)
        figures["bits_per_pixel_packed"] = spec.bits_per_image / (spec.image_height * spec.image_width)
        figures["bits_per_dimension"] = mean["bits"] / spec.image_dimensions
        if "two_stage" in mean:
            figures["two_stage_bits_per_dimension"] = mean["two_stage"] / spec.image_dimensions
        for number, (grid, count) in enumerate(zip(spec.grids, self.counts, strict=True)):
            of = f"_{word(grid.name)}" if len(spec.grids) > 1 else ""
            figures[f"codes_used{of}"] = float((count > 0).double().mean())
            if self.training_counts is not None:
                figures[f"bits_by_training_frequencies{of}"] = frequency_bits(count, self.training_counts[number])
            else:
                figures[f"estimated_entropy_of_codes{of}"] = entropy(count)
            if self.pipeline.tables is not None:
                figures[f"bits_by_tables{of}"] = mean[f"tables {grid.name}"]
        trained_on, comparable = self.trained_on()
        if comparable:
            figures["share_of_training_images"] = trained_on / comparable
        return figures

    def notes(self) -> list[str]:
        """What a person should know before they quote the figures."""
        found = []
        trained_on, comparable = self.trained_on()
        if trained_on > SHARED * comparable:
            which = "all" if trained_on == comparable else f"{trained_on} of {comparable}"
            found.append(
                f"warning: {which} of these images have exactly the codes of images that the prior was trained on, so "
                "the figures flatter it; name images that it has not seen"
            )
        elif self.known is not None and comparable < SHARED * self.images:
            found.append(
                "note: whether the prior was trained on these images cannot be told: their codes are too alike"
            )
        if self.known is None:
            found.append(
                "note: whether the model was trained on these images is not known, as it does not record its training "
                "images; --codes, the code shards of its training, would tell"
            )
        if "ssim" not in self.values:
            found.append(
                f"note: ssim is left out: its windows of {SSIM_WINDOW}x{SSIM_WINDOW} pixels are larger than the images"
            )
        if self.images < FEW:
            psnr_error, bits_error = (standard_error(torch.cat(self.values[name])) for name in ("psnr", "bits"))
            differ = f"{psnr_error:.2f} dB and {bits_error / self.spec.codes_per_image:.2f} bits per code"
            found.append(
                f"note: these are figures of {counted(self.images, 'image')} only: those of others would "
                + (f"differ by some {differ} (standard errors), and " if self.images > 1 else "differ, and ")
                + "use other codes"
            )
        return found


def word(name: str) -> str:
    """A grid's name as part of a key: letters, digits and underscores."""
    return re.sub(r"\W", "_", name)
