"""The task of VAEs of two modalities: steps see classes and texts too, and validations tell how often an image's class
is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from images.datasets import ImageDataset, to_float
from images.sources import FileSource
from stage1_vae.modalities.multimodal import Multimodal, MultimodalConfig
from stage1_vae.modalities.views import bytes_of
from stage1_vae.objectives.multimodal import MultimodalObjective
from stage1_vae.task import VAETask
from training.task import Batch, StepOutput

TEXT = ".txt"  # suffix of the file beside an image that holds its text


class MultimodalTask(VAETask):
    """training.task.Task of `Multimodal`.

    Validation: the figures of all VAEs, of images alone; `accuracy`, of pairs with a class or a text: the share of
    held-out images for which every number of it is told right, given the image, among those that have one, where there
    are any.
    """

    symbols: Tensor | None = None  # of all training images, n L, by their numbers; None: a pair of images
    held_out_symbols: Tensor | None = None  # likewise

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        assert isinstance(self.objective, MultimodalObjective)
        images = to_float(batch["images"])
        symbols = None if self.symbols is None else self.symbols[batch["numbers"].cpu()].to(images.device)
        noise = self.noise_of_step(images, batch["draws"], step)
        output = self.objective.loss(model, images, step, noise, symbols)
        return StepOutput(output.loss, output.metrics)

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, Multimodal)
        metrics = super().validate(model, batch)
        if self.held_out_symbols is None:
            return metrics
        known = int((self.held_out_symbols[self.validation_data.images.indices, 0] >= 0).sum())
        if not known:
            return metrics
        images = to_float(batch["images"])
        symbols = self.held_out_symbols[batch["numbers"].cpu()].to(images.device)
        told = model.symbol_log_probabilities(model.encode(images)).argmax(-1)
        # The mean over all held-out images is that over those with a class or a text.
        weights = torch.where(symbols[:, 0] >= 0, len(self.validation_data) / known, 0.0)
        return {**metrics, "accuracy": (told == symbols).all(dim=1) * weights}


def symbols_of(config: MultimodalConfig, images: ImageDataset) -> Tensor | None:
    """The classes or texts of all images of a source, n L, by their numbers in it, int64, below 0 where an image has
    none or its class is hidden (`data.labels_per_class`); None of a pair of images. A text is that of the file beside
    the image, `photo.txt` of `photo.jpg`, or the name of its class. Raises UserError."""
    source = images.source
    if config.pair == "image_label":
        if source.labels is not None and source.labels.max() >= config.classes:
            raise UserError(
                f"model.classes={config.classes} and images of {int(source.labels.max()) + 1} classes, expected as "
                "many: give model.classes"
            )
        return known_labels(images).unsqueeze(1)
    if config.pair != "image_tokens":
        return None
    if isinstance(source, FileSource):
        files = [Path(source.location(index)).with_suffix(TEXT) for index in range(len(source))]
        if any(file.is_file() for file in files):
            if images.config.labels_per_class is not None:
                raise UserError(
                    f"data.labels_per_class={images.config.labels_per_class}, but the texts of {source.title} are "
                    f"{TEXT} files beside the images, not names of classes: leave it out, and leave away some of these"
                )
            texts = [read_text(file) if file.is_file() else "" for file in files]
            tokens = bytes_of(texts, config.length)
            tokens[[not text for text in texts]] = -1
            return tokens
    if source.class_names is None:
        return torch.full((len(source), config.length), -1)
    names, labels = bytes_of(source.class_names, config.length), known_labels(images)
    return names[labels.clamp(min=0)].where(labels[:, None] >= 0, -1)


def check_symbols(config: MultimodalConfig, symbols: Tensor | None, images: ImageDataset) -> None:
    """Raises UserError where no image of those that are trained on has a class or a text, n L."""
    if symbols is None or (symbols[images.indices, 0] >= 0).any():
        return
    told = "classes: sort them into folders of classes"
    if config.pair == "image_tokens":
        told = "texts: put photo.txt beside photo.jpg, or images into folders of classes, whose names are their texts"
    raise UserError(f"model.pair={config.pair}, but the images of {images.source.title} have no {told}")


def known_labels(images: ImageDataset) -> Tensor:
    """Of all images of a source, by their numbers in it, n, -1 where there is none; those of `images` as these have
    them."""
    labels = np.full(len(images.source), -1) if images.source.labels is None else images.source.labels.copy()
    labels[images.indices] = images.labels
    return torch.from_numpy(labels)


def read_text(file: Path) -> str:
    """Raises UserError."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 ({error}); save it as UTF-8, or remove it") from error
