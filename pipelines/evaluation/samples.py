"""Made images, a model's or somebody's files, held against a reference set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from codes.training_images import hashes_of
from common.errors import UserError
from common.files import sha256_of_file
from common.processes import on_main_process
from images.datasets import ImageDataset, to_float
from metrics.features import FeatureNetwork, fingerprint
from metrics.reference import Reference, cache_folder, find, keep
from metrics.statistics import FeatureStatistics, names_in_npz
from pipelines.any_size import encode_any_size
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.gathering import Values, statistics_of
from pipelines.evaluation.generation import (
    TITLE,
    RealSet,
    generation_figures,
    looked_at,
    names_for,
    share_that_agrees,
)
from pipelines.evaluation.images import check_some, check_there, evenly, hash_of_set, images_of_size, with_classes_of
from pipelines.evaluation.made import (
    ImagesOfSet,
    SamplesOfCodes,
    SamplesOfLatents,
    SetOfImages,
    files_of,
)
from pipelines.evaluation.outcome import Outcome
from pipelines.evaluation.protocol import of_images
from pipelines.evaluation.written import made_with
from pipelines.given_codes import GivenCodes
from pipelines.judge import Judge, load_judge
from pipelines.latents.pipeline import LatentPipeline
from pipelines.sampling_options import chosen_precision
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.sampling_config import SamplingConfig

COMPARED = 512  # reference images of which it is told whether the prior was trained on them
STATISTICS = ("mu", "sigma")  # arrays of a file of statistics

Pipeline = TwoStagePipeline | LatentPipeline


def judge_made(
    config: EvaluateConfig,
    pipeline: Pipeline | None,
    network: FeatureNetwork,
    test: Values,
    given: GivenCodes | None,
    outcome: Outcome,
    state: PartialState,
) -> None:
    """Adds the figures of made images to `outcome`, on the first process. pipeline: None where files are judged without
    a model, or beside one; test: what the test images gave, features among them. Raises UserError."""
    judge = judge_of(config, pipeline, outcome, state)
    made, description = made_images(config, pipeline, given)
    found = looked_at(made, network, judge, state, "made batches")
    size, channels = shape_of(made, pipeline)
    real = real_set(config, (size, channels), network, judge, test, pipeline, outcome, state)
    if not state.is_main_process or real is None:
        return
    check_some(found, len(found.get("sha256", ())), str(config.made))
    own_hash = hash_of_set(found)
    if own_hash == outcome.protocol["reference"]["sha256"]:
        raise UserError(
            f"made={config.made} holds exactly the images of the reference: nothing is compared; name others"
        )
    outcome.protocol["made"] = {**description, "images": len(found["sha256"]), "sha256": own_hash}
    figures, notes, settings = generation_figures(found, real, network, state.device)
    outcome.protocol["settings"] = settings
    outcome.add(TITLE, figures, notes)
    others = f"{figures['reference_images']:,}" if figures["reference_images"] else "statistics of unknown number"
    counts = f"{figures['made_images']:,} made images against {others}"
    names = names_for(network)
    outcome.labels |= {name: counts for name in (names.frechet, names.kernel) if name in figures}
    if names.frechet in figures:
        outcome.says.append(f"{names.frechet.upper()} {figures[names.frechet]:.3f} of {counts}")


def judge_of(config: EvaluateConfig, pipeline: Pipeline | None, outcome: Outcome, state: PartialState) -> Judge | None:
    """With what the protocol says of it. Raises UserError."""
    if config.judge is None:
        return None
    classes = pipeline.num_classes if isinstance(pipeline, TwoStagePipeline) else 0
    found = load_judge(config.judge, config.judge_weights, classes).to(state.device)
    own = getattr(sys.modules.get(config.judge.partition(":")[0]), "__file__", None)  # of MODULE:FUNCTION
    treatment = {"source": sha256_of_file(Path(own))} if own else {}
    outcome.protocol["judge"] = {"network": config.judge, "fingerprint": fingerprint(config.judge, found, treatment)}
    return found


def made_images(
    config: EvaluateConfig, pipeline: Pipeline | None, given: GivenCodes | None
) -> tuple[SetOfImages, dict[str, Any]]:
    """With what the protocol says of them. Raises UserError."""
    if config.samples is None:
        size, channels = (None, None) if pipeline is None else size_of(pipeline)
        classes = pipeline.class_names if isinstance(pipeline, TwoStagePipeline) else None
        images = files_of(str(config.made), size, channels, classes)
        about = {"path": config.made, "made_with": made_with(str(config.made))}
        return ImagesOfSet(images, config.batch_size), about
    if pipeline is None:
        raise UserError(
            f"samples={config.samples}, but {config.model} is stage one alone, which draws nothing; name an assembled "
            "model, or images by --made"
        )
    if isinstance(pipeline, LatentPipeline):
        options = [name for name in SamplingConfig.__dataclass_fields__ if name != "precision"]
        config.check_not_asked(options, "a VAE, which draws without it")
        pixels, precision = config.pixels or "mean", chosen_precision(config.precision)
        samples = SamplesOfLatents(pipeline, config.samples, config.batch_size, config.seed, pixels, precision)
        return samples, {"seed": config.seed, "pixels": pixels, "precision": precision}
    config.check_not_asked(("pixels",), "which is no VAE")
    sampling = config.sampling(pipeline.sampling)
    drawn = SamplesOfCodes(pipeline, config.samples, config.batch_size, config.seed, sampling, given)
    classes_are = "as given" if drawn.as_given else "in turn" if pipeline.num_classes else None
    return drawn, {"seed": config.seed, "classes": classes_are, "sampling": sampling.record}


def size_of(pipeline: Pipeline) -> tuple[tuple[int, int], int]:
    """Height and width, and channels."""
    if isinstance(pipeline, LatentPipeline):
        height, width = pipeline.vae.image_size
        return (height, width), pipeline.vae.config.channels
    spec = pipeline.prior.code_spec
    return (spec.image_height, spec.image_width), spec.image_channels


def shape_of(made: SetOfImages, pipeline: Pipeline | None) -> tuple[tuple[int, int], int]:
    if isinstance(made, ImagesOfSet):
        config = made.dataset.config
        return (config.height, config.width), config.channels
    assert pipeline is not None
    return size_of(pipeline)


def real_set(
    config: EvaluateConfig,
    shape: tuple[tuple[int, int], int],
    network: FeatureNetwork,
    judge: Judge | None,
    test: Values,
    pipeline: Pipeline | None,
    outcome: Outcome,
    state: PartialState,
) -> RealSet | None:
    """On the first process, with what the protocol says of it; None on the others. Raises UserError."""
    if config.reference is not None and is_statistics(config.reference):
        outcome.protocol["reference"] = {
            "path": config.reference,
            "sha256": sha256_of_file(Path(config.reference).expanduser()),
            "statistics": "mu and sigma, of a network and a treatment that the file does not tell",
        }
        return RealSet(None, FeatureStatistics.from_npz(Path(config.reference).expanduser()))
    # Not by what `test` holds: on other processes than the first it is empty, and all must go the same way.
    if config.reference is None and config.model is not None and judge is None:
        if not state.is_main_process:
            return None
        outcome.protocol["reference"] = {"same_as": "images", "sha256": outcome.protocol["images"]["sha256"]}
        note_of_training(outcome, pipeline, None)
        return RealSet(torch.from_numpy(test["features"]), statistics_of(test["features"]))
    path, split = config.data.path, config.data.split
    if config.reference is not None:
        path, split = config.reference, config.reference_split
        check_there("reference", path)
    if path is None:
        raise UserError("made images without a reference, expected real ones: give --reference, or --data.path")
    images = images_of_size(path, split, config.data.max_bad_share, *shape)
    if isinstance(pipeline, TwoStagePipeline):
        images = with_classes_of(images, pipeline.class_names)
    chosen = ImagesOfSet(images, config.batch_size, config.num if config.reference is None else None)
    values = looked_at(chosen, None, judge, state, "reference batches")
    if state.is_main_process:
        check_some(values, len(chosen.chosen), path)
        outcome.protocol["reference"] = of_images(images, split, values, len(chosen.chosen))
    kept = seen_or_kept(config, chosen, network, values, outcome, state)
    if kept is None:
        return None
    note_of_training(outcome, pipeline, images)
    note_of_size(outcome)
    note_of_binarised(outcome, pipeline)
    return RealSet(kept.features, statistics_of(kept.features.numpy()), share_that_agrees(values))


def seen_or_kept(
    config: EvaluateConfig,
    images: ImagesOfSet,
    network: FeatureNetwork,
    values: Values,
    outcome: Outcome,
    state: PartialState,
) -> Reference | None:
    """Features of a reference set, computed once for ever; on the first process, None on the others. values: the hash
    of each image."""
    folder = cache_folder() if config.reference_cache is None else Path(config.reference_cache)
    described: dict[str, Any] = {}
    kept: Reference | None = None

    def look_up() -> bool:
        nonlocal kept, described
        about = outcome.protocol["reference"]
        described = {
            "images": about["sha256"],
            "count": about["images"],
            "rounding": "8 bits",
            "set": about,
            "network": network.describe(),
        }
        kept = find(folder, described)
        return kept is not None

    if on_main_process(state, look_up):
        return kept
    found = looked_at(images, network, None, state, "reference batches")
    if not state.is_main_process:
        return None
    parts = (torch.from_numpy(found[name]) if name in found else None for name in ("features", "probabilities"))
    features, probabilities = parts
    assert features is not None
    made = Reference(features, probabilities, described)
    keep(folder, made)
    return made


def note_of_size(outcome: Outcome) -> None:
    about = outcome.protocol["reference"]
    size = f"{about['size'][0]}x{about['size'][1]}"
    if about["own_size"] != size:
        outcome.notes.append(
            f"note: images of the reference are {about['own_size']} and were scaled to {size}: figures against images "
            "that were made at this size are others"
        )


def note_of_binarised(outcome: Outcome, pipeline: Pipeline | None) -> None:
    """Says that a reference is judged as it is, whatever a VAE's training did to its images."""
    trained = pipeline.vae.binarised if isinstance(pipeline, LatentPipeline) else None
    if trained is not None and trained.how != "none":
        outcome.notes.append(
            f"note: the model was trained on images that were made black and white ({trained}), and the reference is "
            "not: name one that is, or leave --reference out, as the test images are binarised alike"
        )


def is_statistics(path: str) -> bool:
    """Whether a file holds statistics and no images. Raises UserError for a damaged one."""
    place = Path(path).expanduser()
    if not (place.is_file() and place.suffix == ".npz"):
        return False
    names = names_in_npz(place)
    return set(STATISTICS) <= set(names) and "arr_0" not in names


def note_of_training(outcome: Outcome, pipeline: Pipeline | None, images: ImageDataset | None) -> None:
    """Says in protocol and notes how many of the reference images the prior was trained on, where that can be told.
    images: None for the test images, of which it is known already."""
    share = outcome.figures.get("share_of_training_images")
    if images is not None:
        if not isinstance(pipeline, TwoStagePipeline) or (known := pipeline.prior.training_images) is None:
            return
        chosen = evenly(COMPARED, len(images))
        batch, _ = images.fetch_readable(chosen, chosen)
        codes = encode_any_size(pipeline.autoencoder, to_float(batch["images"]))
        trained_on, comparable = known.among(hashes_of([grid.cpu() for grid in codes]))
        share = trained_on / comparable if comparable else None
    if share is None:
        return
    outcome.protocol["reference"]["share_of_training_images"] = share
    if share > 0.5:
        outcome.notes.append(
            f"note: {share:.0%} of the reference images, as far as that can be told, are images that the model was "
            "trained on: a model that repeats them has the best figures"
        )
