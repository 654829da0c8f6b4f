"""The task of VAEs of two modalities: steps see classes and texts too, and validations tell how often an image's class
is told."""

from __future__ import annotations

from pathlib import Path

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
    held-out images for which every number of it is told right, given the image.
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
        images = to_float(batch["images"])
        symbols = self.held_out_symbols[batch["numbers"].cpu()].to(images.device)
        told = model.symbol_log_probabilities(model.encode(images)).argmax(-1)
        return {**metrics, "accuracy": (told == symbols).all(dim=1).float()}


def symbols_of(config: MultimodalConfig, images: ImageDataset) -> Tensor | None:
    """The classes or texts of all images of a source, n L, int64, below 0 where an image has none; None of a pair of
    images. A text is that of the file beside the image, `photo.txt` of `photo.jpg`, or the name of its class. Raises
    UserError."""
    source = images.source
    if config.pair == "image_label":
        if source.labels is None or source.labels.max() >= config.classes:
            count = 0 if source.labels is None else int(source.labels.max()) + 1
            raise UserError(
                f"model.pair=image_label with model.classes={config.classes} and images of {count} classes: give as "
                "many, of images in folders of classes"
            )
        return torch.from_numpy(source.labels).unsqueeze(1)
    if config.pair != "image_tokens":
        return None
    if isinstance(source, FileSource):
        files = [Path(source.location(index)).with_suffix(TEXT) for index in range(len(source))]
        if any(file.is_file() for file in files):
            texts = [file.read_text(encoding="utf-8").strip() if file.is_file() else "" for file in files]
            tokens = bytes_of(texts, config.length)
            tokens[[not text for text in texts]] = -1
            return tokens
    if source.labels is None or source.class_names is None:
        raise UserError(
            "model.pair=image_tokens, but the images have no texts: put photo.txt beside photo.jpg, or images into "
            "folders of classes, whose names are their texts"
        )
    names = bytes_of(source.class_names, config.length)
    labels = torch.from_numpy(source.labels)
    return names[labels.clamp(min=0)].where(labels[:, None] >= 0, -1)
