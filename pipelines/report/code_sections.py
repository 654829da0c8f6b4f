"""The sections of an autoencoder of codes, of a prior, and of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from codes.shard_folder import Split
from codes.shards import CodeDataset
from codes.spec import CodeSpec
from common.errors import UserError
from common.wording import counted
from pipelines.any_size import encode_any_size
from pipelines.report import codebook, memorisation, samples
from pipelines.report.charts import number
from pipelines.report.collect import Subject
from pipelines.report.facts import speeds_of
from pipelines.report.findings import Asked, Findings, Missing, Positions
from pipelines.report.images import Sets, Shown, evenly
from pipelines.report.measured_images import held_out_of, images_to_measure
from pipelines.report.models import Models
from pipelines.report.reconstructions import Measured, reconstruct_images
from pipelines.stages import check_made_by


def of_codes(found: Findings, asked: Asked, say: Callable[[str], None]) -> None:
    """The sections of an autoencoder of codes, of a prior, and of both."""
    models, no_model = found.models, Missing(found.models.why_no_autoencoder)
    autoencoder, measured, test = models.autoencoder, None, None
    spec = autoencoder.code_spec() if autoencoder else models.prior.code_spec if models.prior else None
    shards = shards_of(found.subject, models, asked)
    sets: Sets | None = None
    if autoencoder is None:
        found.reconstructions = found.codebook = no_model
    else:
        sets, test = images_to_measure(found, asked, autoencoder.image_size, autoencoder.channels, None)
        if isinstance(test, Shown):
            say(f"{counted(len(test), 'test image')}: {test.title}")
            measured = measure(models, test, asked, sets)
            found.reconstructions = measured.figures
            found.speeds += speeds_of(measured)
        else:
            found.reconstructions = test
    counted_codes = count_codes(spec, shards, measured)
    if counted_codes is None:
        why = Missing(models.why_none or "Give codes or images: --codes SHARDS or --data.path IMAGES.")
        found.usage = found.positions = why
    else:
        assert spec is not None
        found.codes_title = counted_codes.title
        found.usage = codebook.use_of(spec, counted_codes)
        bits, of_bits = prior_bits(models, shards, measured, asked)
        found.positions = Positions(codebook.places_of(spec, counted_codes, bits), of_bits)
    if autoencoder is not None:
        found.codebook = codebook.books_of(autoencoder, counted_codes, asked.batch_size)
    draw_samples(found, asked, say)
    find_nearest(found, shards, sets, test, asked)


def shards_of(subject: Subject, models: Models, asked: Asked) -> dict[str, CodeDataset] | None:
    """The code shards that were given, or else those that lie with the subject, both parts of them; None where neither
    are of its models."""
    for folder in (asked.codes, subject.codes):
        with suppress(UserError):
            if folder is not None:
                return fitting_shards(folder, models)
    return None


def check_given_codes(folder: str, all_models: Sequence[Models]) -> None:
    """Raises UserError unless the shards are whole, and of the models of one subject at least."""
    errors = []
    for models in all_models:
        try:
            fitting_shards(folder, models)
            return
        except UserError as error:
            errors.append(error)
    raise errors[0]


def fitting_shards(folder: str | Path, models: Models) -> dict[str, CodeDataset]:
    """Both parts of code shards. Raises UserError for those of another model, and for those without training images."""
    splits: tuple[Split, ...] = get_args(Split)
    parts: dict[str, CodeDataset] = {split: CodeDataset(folder, split) for split in splits}
    training = parts["train"]
    if models.autoencoder is not None:
        check_made_by(training, models.autoencoder)
    elif models.prior is None or models.prior.code_spec != training.code_spec:
        raise UserError(f"{folder} holds {training.code_spec.describe()}, expected the codes of a model of this report")
    if not len(training):
        raise UserError(f"{folder} holds no training images; name the codes that the prior was trained on")
    return parts


def measure(models: Models, test: Shown, asked: Asked, sets: Sets) -> Measured:
    autoencoder = models.autoencoder
    assert autoencoder is not None

    def decode(codes: tuple[Tensor, ...]) -> Tensor:
        return autoencoder.decode(tuple(grid.to(asked.device) for grid in codes))

    with torch.no_grad():
        return reconstruct_images(
            test, lambda images: encode_any_size(autoencoder, images), decode, asked.batch_size, sets.class_names
        )


def count_codes(
    spec: CodeSpec | None, shards: dict[str, CodeDataset] | None, measured: Measured | None
) -> codebook.CodeSet | None:
    """Of the training part of the shards, or else of the test images; None where there are neither."""
    if shards is not None:
        return codebook.codes_of_shards(shards["train"], f"training images of {shards['train'].folder}")
    if measured is None or spec is None:
        return None
    return codebook.codes_of_images(measured.codes, spec, measured.images.title)


def prior_bits(
    models: Models, shards: dict[str, CodeDataset] | None, measured: Measured | None, asked: Asked
) -> tuple[list[Tensor] | None, str]:
    """Bits of each place under the prior, h w for each grid, and of which images, or why there are none."""
    prior = models.prior
    if prior is None:
        return None, ""
    if shards is not None and len(shards["validation"]):
        dataset = shards["validation"]
        chosen = evenly(asked.num, len(dataset))
        batch = dataset.fetch(chosen, chosen)
        codes, labels, of = batch["codes"], batch["labels"], f"{counted(len(chosen), 'held-out image')} of the shards"
    elif measured is not None:
        images = measured.images
        codes, labels = measured.codes, torch.full((len(images),), -1)
        of = f"{counted(len(images), 'image')}, {images.title}, of any class"
    else:
        return None, "For the bits under the prior give held-out codes or images: --codes SHARDS or --data.path IMAGES."
    try:
        return codebook.bits_at_places(prior, codes, labels, asked.batch_size), of
    except UserError as error:
        return None, f"There are no bits under the prior: {error}."


def draw_samples(found: Findings, asked: Asked, say: Callable[[str], None]) -> None:
    pipeline = found.models.pipeline
    if pipeline is None:
        found.samples = Missing(found.models.why_no_pipeline)
    elif not asked.samples:
        found.samples = Missing("No samples were asked for: leave --samples 0 out.")
    elif pipeline.prior.given:
        found.samples = Missing("The prior goes by codes of other pictures: draw with generate --given SHARDS.")
    else:
        found.samples = samples.draw(pipeline, asked.seed, asked.samples, asked.batch_size, say)
        found.speeds.append(("Samples, per second, here", number(found.samples.speed)))


def find_nearest(
    found: Findings,
    shards: dict[str, CodeDataset] | None,
    sets: Sets | None,
    test: Shown | Missing | None,
    asked: Asked,
) -> None:
    drawn, pipeline = found.samples, found.models.pipeline
    if isinstance(drawn, Missing):
        found.memorisation = Missing(f"It is asked of samples. {drawn.why}")
    if not isinstance(drawn, samples.Samples) or pipeline is None:
        return
    images = torch.cat([pipeline.decode(part).cpu() for part in samples.in_batches(drawn.codes, asked.batch_size)])
    if shards is not None:
        training = shards["train"]
        found.memorisation = memorisation.by_codes(
            drawn.codes, images, training, shards["validation"], lambda codes: pipeline.decode(codes).cpu()
        )
    elif sets is not None and sets.training is not None:
        found.memorisation = memorisation.by_pixels(images, sets.training, sets.training_title, held_out_of(sets, test))
    else:
        found.memorisation = Missing("Give the codes that it was trained on: --codes SHARDS.")
