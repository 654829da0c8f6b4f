"""Test images through a model of codes: stage one alone, or both stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import Codes
from common.computing import check_device
from common.errors import UserError
from common.precision import Precision
from common.wording import counted
from images.datasets import ImageDataset, to_float
from pipelines.any_size import decoded, encode_any_size
from pipelines.codec.tables import CodeTables
from pipelines.evaluation.codebook import Codebook
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.gathering import Values, joined, know_all_bad_images, of_all_batches
from pipelines.evaluation.images import (
    check_some,
    digests,
    evenly,
    images_of_size,
    in_batches,
    with_classes_of,
)
from pipelines.evaluation.outcome import Outcome
from pipelines.evaluation.prior import PriorBits
from pipelines.evaluation.protocol import of_images
from pipelines.evaluation.reconstruction import Reconstruction
from pipelines.figures import FEW, standard_error
from pipelines.given_codes import GivenCodes, given_codes
from pipelines.model_folders import INDEX_NAME, any_model_folder
from pipelines.stages import check_made_by, load_autoencoder
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.priors import Prior
from stage2_prior.sampling_config import SamplingConfig


class StageOne(NamedTuple):
    """An autoencoder without a prior, where a pipeline may stand."""

    autoencoder: Autoencoder
    prior: None = None
    tables: None = None
    class_names: None = None


ModelOfCodes = TwoStagePipeline | StageOne


def open_model_of_codes(path: str, device: torch.device) -> ModelOfCodes:
    """Raises UserError."""
    if (any_model_folder(path) / INDEX_NAME).is_file():
        return TwoStagePipeline.from_pretrained(path).to(device)
    return StageOne(load_autoencoder(path).to(device).eval())


def training_codes(folder: str, autoencoder: Autoencoder) -> CodeDataset:
    """The training part of code shards. Raises UserError for codes of another model, damaged ones, and where there
    is none."""
    dataset = CodeDataset(folder, "train")
    check_made_by(dataset, autoencoder)
    if not len(dataset):
        raise UserError(f"{folder} holds no training images; name the codes that the prior was trained on")
    dataset.verify()
    return dataset


class Figures:
    """What test images give, batch after batch."""

    def __init__(
        self,
        model: ModelOfCodes,
        training: CodeDataset | None = None,
        reconstruction: Reconstruction | None = None,
        precision: Precision | None = None,
    ) -> None:
        """training: codes that the prior was trained on; reconstruction: left out, one without networks; precision: of
        the decoder."""
        self.autoencoder: Autoencoder = model.autoencoder
        prior: Prior | None = model.prior
        tables: CodeTables | None = model.tables
        self.spec = self.autoencoder.code_spec() if prior is None else prior.code_spec
        self.reconstruction = reconstruction or Reconstruction()
        self.codebook = Codebook(self.spec, training)
        self.bits = None if prior is None else PriorBits(self.autoencoder, prior, tables, training)
        self.precision = precision
        self.values: Values = {}

    @torch.no_grad()
    def measure(self, images: Tensor, labels: Tensor, given: Codes | None = None) -> Values:
        """images: b c H W in [-1, 1], labels: b, below 0 where there is none; both on the model's device; given: codes
        that the prior goes by."""
        codes = encode_any_size(self.autoencoder, images)
        made = decoded(self.autoencoder, codes, self.precision)
        found = {**self.reconstruction.measure(images, made), **self.codebook.measure(codes)}
        if self.bits is not None:
            found |= self.bits.measure(images, labels, codes, given)
        return {name: value.cpu().numpy() for name, value in found.items()}

    def add(self, images: Tensor, labels: Tensor, given: Codes | None = None) -> None:
        self.take(self.measure(images, labels, given))

    def take(self, values: Values) -> None:
        """What `measure` gave of further images."""
        self.values = joined([self.values, values]) if self.values else values

    @property
    def images(self) -> int:
        return len(self.values.get("psnr", ()))

    def groups(self) -> dict[str, dict[str, Any]]:
        """Figures by the title of their group."""
        found = {
            self.reconstruction.title: {"images": self.images, **self.reconstruction.figures(self.values)},
            self.codebook.title: self.codebook.figures(self.values),
        }
        if self.bits is not None:
            found[self.bits.title] = self.bits.figures(self.values)
        return found

    def means(self) -> dict[str, Any]:
        """All figures."""
        return {name: value for group in self.groups().values() for name, value in group.items()}

    def notes(self) -> list[str]:
        """What a person should know before they quote the figures."""
        found = [] if self.bits is None else self.bits.notes(self.values)
        found += self.reconstruction.notes(self.values) + self.codebook.notes(self.values)
        if self.images < FEW:
            differ = f"{standard_error(torch.from_numpy(self.values['psnr'])):.2f} dB"
            if self.bits is not None:
                error = standard_error(torch.from_numpy(self.values["bits"])) / self.spec.codes_per_image
                differ += f" and {error:.2f} bits per code"
            found.append(
                f"note: these are figures of {counted(self.images, 'image')} only: those of others would "
                + (f"differ by some {differ} (standard errors), and " if self.images > 1 else "differ, and ")
                + "use other codes"
            )
        return found


def judge_model_of_codes(
    config: EvaluateConfig,
    model: ModelOfCodes,
    reconstruction: Reconstruction,
    given: GivenCodes | None,
    outcome: Outcome,
    state: PartialState,
) -> Values:
    """Adds the figures of test images to `outcome`, on the first process, and returns what each image gave. Raises
    UserError."""
    images, device = images_for(config, model), state.device
    training = None if config.codes is None else training_codes(config.codes, model.autoencoder)
    own = SamplingConfig() if isinstance(model, StageOne) else model.sampling
    precision = config.sampling(own).decoding
    check_device(device, precision)
    if precision is not None:
        outcome.protocol["reconstruction"] = {"decoder_precision": precision}
    figures = Figures(model, training, reconstruction, precision)
    chosen = evenly(config.num, len(images))

    def measure(indices: Sequence[int]) -> Values | None:
        batch, found = images.fetch_readable(indices, indices)  # another in its place would count twice
        if not found:
            return None
        others = None if given is None else given.of_names(images.names(found))
        values = figures.measure(
            to_float(batch["images"]).to(device),
            batch["labels"].to(device),
            None if others is None else tuple(grid.to(device) for grid in others),
        )
        return {**values, "sha256": digests(batch["images"])}

    values = of_all_batches(in_batches(chosen, config.batch_size), measure, state, "batches")
    know_all_bad_images(images, state)
    if not state.is_main_process:
        return values
    check_some(values, len(chosen), str(config.data.path))
    figures.take(values)
    for title, group in figures.groups().items():
        outcome.add(title, group, [])
    outcome.notes += figures.notes()
    outcome.labels |= reconstruction.labels(values)
    outcome.protocol["images"] = of_images(images, config.data.split, values, len(chosen))
    outcome.unread = images.bad_images.summary()
    found = outcome.figures
    outcome.says += [f"PSNR {found['psnr']:.2f} dB"]
    if "bits_per_code" in found:
        outcome.says += [f"{found['bits_per_code']:.3f} bits per code", f"{found['bits_per_pixel']:.4f} bits per pixel"]
    return values


def images_for(config: EvaluateConfig, model: ModelOfCodes) -> ImageDataset:
    """The test images at the model's size, their classes numbered as the prior numbers them. Raises UserError."""
    spec = model.autoencoder.code_spec() if model.prior is None else model.prior.code_spec
    size = (spec.image_height, spec.image_width)
    data = config.data
    images = images_of_size(str(data.path), data.split, data.max_bad_share, size, spec.image_channels)
    return with_classes_of(images, model.class_names)


def given_of(config: EvaluateConfig, model: ModelOfCodes, outcome: Outcome) -> GivenCodes | None:
    """Codes that the model goes by, of the pictures that belong to the test images. Raises UserError where it goes by
    none, and where they are missing."""
    if model.prior is None or not model.prior.given:
        if config.given is not None:
            raise UserError(f"given={config.given}, but {config.model} goes by no other codes; leave given out")
        return None
    if config.given is None:
        grids = " + ".join(f"{grid.height}x{grid.width} codes of {grid.vocabulary}" for grid in model.prior.given)
        raise UserError(
            f"{config.model} goes by codes of other pictures, {grids}: give --given, the folder of code shards of "
            "those that belong to the test images"
        )
    found = given_codes(model.prior, config.given, config.given_split)
    outcome.notes += [] if found.note is None else [f"note: {found.note}"]
    outcome.protocol["given"] = {"path": config.given, "split": config.given_split, "sha256": found.fingerprint}
    return found


def described(model: ModelOfCodes, path: str) -> dict[str, Any]:
    """Of the model, for the protocol."""
    found: dict[str, Any] = {"path": path, "stage1": model.autoencoder.kind}
    found["stage1_fingerprint"] = model.autoencoder.fingerprint()
    if model.prior is not None:
        found |= {"stage2": model.prior.kind, "stage2_fingerprint": model.prior.fingerprint()}
    return found
