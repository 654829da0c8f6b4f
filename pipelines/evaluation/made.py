"""Images that are judged as a set: what a model draws, or files that somebody has made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from codes.spec import Codes
from common.computing import check_device
from common.errors import UserError
from common.precision import Precision
from images.datasets import DataConfig, ImageDataset, to_uint8
from images.sources import FileSource, open_source
from pipelines.evaluation.images import check_there, evenly, in_batches, with_classes_of
from pipelines.evaluation.written import written
from pipelines.generation.layout import PER_SHARD, Layout, batches
from pipelines.given_codes import GivenCodes
from pipelines.latents.pipeline import LatentPipeline
from pipelines.prior_requests import labels_of, prompts_of
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.model import Pixels
from stage2_prior.sampling_config import SamplingConfig


class SetOfImages(Protocol):
    """Images of one size, in batches that do not depend on who fetches them."""

    batches: Sequence[Any]

    def fetch(self, batch: Any) -> tuple[Tensor, Tensor]:
        """uint8 b c H W on the CPU, and labels, b, below 0 where there are none."""
        ...


class ImagesOfSet:
    """Real images, or files of made ones."""

    def __init__(self, dataset: ImageDataset, batch_size: int, num: int | None = None) -> None:
        self.dataset = dataset
        self.chosen = evenly(num, len(dataset))
        self.batches: Sequence[Any] = in_batches(self.chosen, batch_size)

    def fetch(self, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        found, _ = self.dataset.fetch_readable(batch, batch)
        return found["images"], found["labels"]


class SamplesOfCodes:
    """Samples of a pipeline, those that `zellige generate` writes with the same settings."""

    def __init__(
        self,
        pipeline: TwoStagePipeline,
        num: int,
        batch_size: int,
        seed: int,
        sampling: SamplingConfig,
        given: GivenCodes | None = None,
    ) -> None:
        """given: codes that the model goes by, sample i by those of image i. Raises UserError."""
        sampling.check_fits(pipeline.prior)
        check_device(pipeline.device, sampling.precision, sampling.decoding)
        self.pipeline, self.num, self.seed, self.sampling, self.given = pipeline, num, seed, sampling, given
        size = min(batch_size, num)  # batches are full, as those of `generate`: what lies beyond its unit is dropped
        units = Layout("png", max(PER_SHARD, size)).units(range(num), num)
        self.batches: Sequence[Any] = [(batch, unit.stop) for unit in units for batch in batches(unit, size)]
        self.as_given = given is not None and given.has_classes_of(pipeline)
        self.classes(range(1))  # refuses a model that must be told more

    def classes(self, samples: range) -> list[int] | None:
        if self.given is not None and self.as_given:
            return self.given.labels_of(samples)
        return labels_of(self.pipeline.prior, samples)

    def fetch(self, batch_and_end: tuple[range, int]) -> tuple[Tensor, Tensor]:
        batch, end = batch_and_end
        labels = self.classes(batch)
        prompts = prompts_of(self.pipeline.prior, batch)
        given: Codes | None = None if self.given is None else self.given.of(batch)
        codes = self.pipeline.sample(batch, labels, self.seed, self.sampling, prompts=prompts, given=given)
        count = min(len(batch), end - batch.start)
        images = decoded_each(self.pipeline, codes, count, self.sampling.decoding)
        return images, torch.tensor([-1] * count if labels is None else labels[:count])


def decoded_each(pipeline: TwoStagePipeline, codes: Codes, count: int, precision: Precision | None = None) -> Tensor:
    """The first images of codes, rounded as in a file: uint8 count c H W on the CPU. On a CPU each by itself, as
    `generate` decodes them: a product of matrices adds up in an order that depends on how many images there are."""
    if pipeline.device.type != "cpu":
        return to_uint8(pipeline.decode(tuple(grid[:count] for grid in codes), precision=precision)).cpu()
    alone = [pipeline.decode(tuple(grid[i : i + 1] for grid in codes), precision=precision) for i in range(count)]
    return to_uint8(torch.cat(alone))


class SamplesOfLatents:
    """Samples of a VAE, those that `zellige generate` writes with the same settings."""

    def __init__(
        self,
        pipeline: LatentPipeline,
        num: int,
        batch_size: int,
        seed: int,
        pixels: Pixels,
        precision: Precision | None = None,
    ) -> None:
        """Raises UserError for a precision that model or device do not have."""
        pipeline.check_precision(precision)
        self.pipeline, self.seed, self.pixels, self.precision = pipeline, seed, pixels, precision
        self.batches: Sequence[Any] = [list(batch) for batch in in_batches(range(num), batch_size)]

    def fetch(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        if self.pipeline.device.type == "cpu":
            images = torch.cat([self.sample([i]) for i in batch])
        else:
            images = self.sample(batch)
        return to_uint8(images).cpu(), torch.full((len(batch),), -1)

    def sample(self, indices: list[int]) -> Tensor:
        return self.pipeline.sample(indices, self.seed, self.pixels, precision=self.precision).images


def files_of(
    path: str, size: tuple[int, int] | None, channels: int | None, classes: Sequence[str] | None
) -> ImageDataset:
    """Made images: a folder or an address, of `zellige generate` or another, or an .npz file. size, channels: those
    they must have, None for their own; classes: the names of a model's. Raises UserError."""
    check_there("made", path)
    by_record = written(path)
    source = open_source(path, "train", Path()) if by_record is None else by_record
    sizes = np.unique(source.sizes(range(len(source))), axis=0)
    sizes = sizes[sizes.min(axis=1) > 0]
    if len(sizes) != 1 or (size is not None and tuple(sizes[0].tolist()) != size):
        found = ", ".join(f"{height}x{width}" for height, width in sizes[:3].tolist())
        wanted = "one size" if size is None else f"{size[0]}x{size[1]}, the size that the model makes"
        raise UserError(
            f"made={path} holds images of {found or 'no known size'}, expected {wanted}; name another folder"
        )
    height, width = sizes[0].tolist()
    config = DataConfig(path=path, image_size=(height, width), channels=1 if channels == 1 else 3)
    dataset = ImageDataset(source, config)
    named = isinstance(source, FileSource) and by_record is None  # by subfolders; else they are numbers
    return with_classes_of(dataset, classes) if named else dataset
