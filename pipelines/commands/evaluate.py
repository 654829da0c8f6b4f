"""`zellige evaluate`: how good a model is on test images: what stage one keeps, and how many bits stage two needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import write_json
from images.datasets import DataConfig, ImageDataset, open_images, to_float
from images.files import MAX_BAD_SHARE
from pipelines.devices import open_device
from pipelines.figures import bits_of_codes, entropy, ssim
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.train import psnr


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
    num: int | None = None  # so many of the images, evenly spread; left out: all
    batch_size: int = 64  # images at a time
    out: str | None = None  # JSON file for the figures; left out: they are only printed
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        for name in ("num", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}, expected at least 1")


def evaluate(config: EvaluateConfig) -> str:
    """Prints a line a figure, writes them to `config.out`, returns one line. Raises UserError."""
    _, device = open_device(config.device)
    pipeline = TwoStagePipeline.from_pretrained(config.model).to(device)
    dataset = images_to_evaluate(config.data, pipeline)
    count = len(dataset) if config.num is None else min(config.num, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    found = Figures(pipeline)
    for start in tqdm(range(0, count, config.batch_size), unit="batch"):
        indices = chosen[start : start + config.batch_size]
        batch, read = dataset.fetch_readable(indices, indices)  # another in its place would count twice
        if read:
            found.add(to_float(batch["images"]).to(device), batch["labels"].to(device))
    if not found.images:
        raise UserError(f"none of the {count} images of {config.data.path} that were chosen can be read")
    figures = {"model": config.model, "data": config.data.path, **found.means()}
    for name, value in figures.items():
        print(f"{name:<28}{value:.4f}" if isinstance(value, float) else f"{name:<28}{value}")
    if config.out is not None:
        write_json(Path(config.out), figures)
    where = f", figures in {config.out}" if config.out else ""
    unread = dataset.bad_images.summary()
    return (
        f"{found.images} images: PSNR {figures['psnr']:.2f} dB, {figures['bits_per_code']:.3f} bits per code, "
        f"{figures['bits_per_pixel']:.4f} bits per pixel{where}" + (f"; {unread}" if unread else "")
    )


def images_to_evaluate(data: EvaluateDataConfig, pipeline: TwoStagePipeline) -> ImageDataset:
    """The images at the model's size, their classes numbered as the prior numbers them. Raises UserError."""
    spec = pipeline.prior.code_spec
    is_folder = Path(data.path).expanduser().is_dir()
    config = DataConfig(
        path=data.path,
        split="train" if is_folder else data.split,
        image_size=(spec.image_height, spec.image_width),
        channels=1 if spec.image_channels == 1 else 3,
        max_bad_share=data.max_bad_share,
    )
    source = open_images(config)
    known = pipeline.class_names
    if source.labels is not None:
        names = source.class_names or ()
        if known is None or not set(names) <= set(known):
            source.labels = np.full(len(source), -1)  # other classes than the prior's: any class
        else:
            source.labels = np.array([known.index(name) for name in names])[source.labels]
    return ImageDataset(source, config)


class Figures:
    """Sums over test images, batch after batch."""

    def __init__(self, pipeline: TwoStagePipeline) -> None:
        self.pipeline = pipeline
        self.spec = pipeline.prior.code_spec
        self.images = 0
        self.sums: dict[str, float] = {}
        self.counts = [torch.zeros(grid.vocabulary, dtype=torch.int64) for grid in self.spec.grids]

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor) -> None:
        """images: b c H W in [-1, 1], labels: b, below 0 where there is none; both on the pipeline's device."""
        codes = self.pipeline.encode(images)
        decoded = self.pipeline.decode(codes)
        bits = bits_of_codes(self.pipeline.prior, codes, labels)
        of_image = torch.stack([part.sum(dim=(1, 2)) for part in bits]).sum(0)  # b
        self.images += len(images)
        self._sum("psnr", psnr((decoded - images).square().mean(dim=(1, 2, 3))))
        if (similarity := ssim(decoded, images)) is not None:
            self._sum("ssim", similarity)
        self._sum("bits", of_image)
        for grid, part in zip(self.spec.grids, bits, strict=True):
            self._sum(f"bits {grid.name}", part.mean(dim=(1, 2)))
        if (decoder := self.pipeline.autoencoder.decoder_bits(images, codes)) is not None:
            self._sum("two_stage", of_image + decoder)
        for count, part in zip(self.counts, codes, strict=True):
            count += part.flatten().cpu().bincount(minlength=len(count))

    def _sum(self, name: str, per_image: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(per_image.cpu().double().sum())

    def means(self) -> dict[str, Any]:
        """Means over the images: PSNR in dB; SSIM (with the extra `eval`); bits per code, of each grid too, per pixel
        and per image-dimension; where the decoder is a likelihood, the bits per dimension of both stages together, a
        bound on the image's own; shares of each grid's codes that occur, and their entropy: what the bits per code of a
        prior that knows only frequencies would be."""
        mean = {name: total / self.images for name, total in self.sums.items()}
        spec = self.spec
        figures: dict[str, Any] = {"images": self.images, "psnr": mean["psnr"]}
        if "ssim" in mean:
            figures["ssim"] = mean["ssim"]
        figures["bits_per_code"] = mean["bits"] / spec.codes_per_image
        if len(spec.grids) > 1:
            figures |= {f"bits_per_code of {g.name}": mean[f"bits {g.name}"] for g in spec.grids}
        figures["bits_per_pixel"] = mean["bits"] / (spec.image_height * spec.image_width)
        figures["bits_per_pixel, packed"] = spec.bits_per_image / (spec.image_height * spec.image_width)
        figures["bits_per_dimension"] = mean["bits"] / spec.image_dimensions
        if "two_stage" in mean:
            figures["two-stage bits_per_dimension"] = mean["two_stage"] / spec.image_dimensions
        for grid, count in zip(spec.grids, self.counts, strict=True):
            of = f" of {grid.name}" if len(spec.grids) > 1 else ""
            figures[f"codes used{of}"] = float((count > 0).double().mean())
            figures[f"entropy of the codes{of}"] = entropy(count)
        return figures
