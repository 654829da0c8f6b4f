"""The images that a report measures and shows: those that are given, or those of a run's own data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from images.datasets import DataConfig, ImageDataset, image_datasets, open_images
from images.sources import DOWNLOADS, has_parts, is_there
from pipelines.report.collect import Subject
from stage1_vae.binarise import Binarisation, Binarised, NumberedImages
from stage1_vae.model import LikelihoodVAE

BATCH = 256  # images that are read at a time


class Shown(NamedTuple):
    """Images in memory."""

    pixels: Tensor  # n c H W, uint8
    labels: np.ndarray  # n, -1 without classes
    numbers: list[int]  # n, in their set
    title: str  # of the set, and which part of it

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Sets:
    """Where the images of a subject come from; None with the reason in one line."""

    test: NumberedImages | ImageDataset | None
    test_title: str
    training: ImageDataset | None
    training_title: str
    class_names: tuple[str, ...] | None = None
    binarised: str = ""  # how test images were made black and white, in words; empty where they were not


def evenly(count: int, among: int) -> list[int]:
    """Up to `count` of the positions 0 to `among` - 1, evenly spread."""
    count = min(count, among)
    return [i * among // count for i in range(count)]


def recorded_data(subject: Subject) -> DataConfig | None:
    """Which images the run of stage one was trained on; None where none says so."""
    for run in subject.runs:
        data: Any = run.config.get("data")
        if isinstance(data, dict) and isinstance(data.get("path"), str):
            try:
                given = replace(DataConfig(**data), crop="center", flip=False, shift=0)
                return replace(given, aspect_buckets=0, labels_per_class=None)
            except (TypeError, AttributeError, UserError):
                return None
    return None


def is_at_hand(data: DataConfig) -> bool:
    """Whether the images can be opened without fetching anything."""
    paths = [data.path, *([data.validation_path] if data.validation_path else [])]
    return all(
        path not in DOWNLOADS and (path.startswith("bundled") or is_there(path)) and "://" not in path for path in paths
    )


def binarised_of(subject: Subject, vae: LikelihoodVAE) -> Binarised | None:
    """How the images of a VAE were made black and white, as it says itself, or else its run; None where neither does.
    A model of an earlier version does not record it."""
    if vae.binarised is not None:
        return vae.binarised
    for run in subject.runs:
        how, seed = run.config.get("binarised"), run.config.get("binarised_seed", 0)
        if isinstance(how, str) and how in get_args(Binarisation) and isinstance(seed, int):
            return Binarised(cast(Binarisation, how), seed)
    return None


def image_sets(
    subject: Subject,
    given: DataConfig | None,
    size: tuple[int, int],
    channels: int,
    binarised: Binarised | None = None,
) -> Sets:
    """Test images: those that are given, or else those that the run held out. Training images: those of the run, always
    in grey or colour. Raises UserError for given images that cannot be opened."""
    test = training = None
    test_title = "Give test images: --data.path IMAGES."
    training_title = "Give the codes that it was trained on: --codes SHARDS."
    class_names = None

    def prepared(dataset: ImageDataset) -> NumberedImages | ImageDataset:
        return dataset if binarised is None else NumberedImages(dataset, binarised.how, binarised.seed, training=False)

    recorded = recorded_data(subject)
    if recorded is not None:
        recorded = replace(recorded, image_size=size, channels=1 if channels == 1 else 3)
        if is_at_hand(recorded):
            try:
                train, held_out = image_datasets(recorded, seed=0)
                training, training_title = train, f"training images of {recorded.path}"
                class_names = train.class_names
                if len(held_out):
                    of = recorded.validation_path or recorded.path
                    test, test_title = prepared(held_out), f"held-out images of {of}"
            except UserError as error:
                test_title = f"The images of the run cannot be opened ({error}): give --data.path IMAGES."
        else:
            test_title = f"The images of the run, {recorded.path}, are not here: give test images, --data.path IMAGES."
    if given is not None:
        config = replace(given, image_size=size, channels=1 if channels == 1 else 3)
        dataset = ImageDataset(open_images(config), config)
        test, class_names = prepared(dataset), dataset.class_names or class_names
        test_title = f"images of {config.path}" + (f", part {config.split}" if has_parts(config.path) else "")
    said = "" if binarised is None or binarised.how == "none" else str(binarised)
    return Sets(test, test_title, training, training_title, class_names, said)


def read_some(dataset: NumberedImages | ImageDataset, count: int, title: str) -> Shown:
    """Up to `count` images, evenly spread; those that cannot be read are left out. Raises UserError if none can."""
    chosen = evenly(count, len(dataset))
    pixels, labels, numbers = [], [], []
    for start in range(0, len(chosen), BATCH):
        indices = chosen[start : start + BATCH]
        batch, found = dataset.fetch_readable(indices, indices)
        if found:
            pixels.append(batch["images"])
            labels.append(batch["labels"].numpy())
            numbers += found
    if not numbers:
        raise UserError(f"none of the {len(chosen)} {title} that were chosen can be read; name others by --data.path")
    return Shown(torch.cat(pixels), np.concatenate(labels), numbers, title)
