"""Made images beside a reference set: distances of their features, how much of one lies among the other, and whether a
classifier finds the classes that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from common.errors import UserError
from images.datasets import to_float
from metrics import trust
from metrics.features import FeatureNetwork
from metrics.frechet import frechet_distance
from metrics.in_training import frechet_name
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance, kernel_distance_of_all
from metrics.manifolds import manifolds
from metrics.statistics import FeatureStatistics
from pipelines.evaluation.gathering import Values, of_all_batches, one_thread_each
from pipelines.evaluation.images import digests
from pipelines.evaluation.made import SetOfImages
from pipelines.evaluation.worth import frechet_is_refused, notes_of, notes_of_frechet
from pipelines.judge import Judge

TITLE = "generation"
SUBSETS, SUBSET, SEED = 100, 1000, 2020  # of the kernel distance, as published
SPLITS = 10  # of the Inception score
NEAREST, NEAREST_DENSITY = 3, 5  # neighbours of precision and recall, of density and coverage


class Names(NamedTuple):
    """Of figures: those with Inception's features have names of their own, and no others may bear them."""

    frechet: str
    kernel: str
    score: str


def names_for(network: FeatureNetwork) -> Names:
    if network.name == "inception":
        return Names(frechet_name(network), "kid", "inception_score")
    return Names(frechet_name(network), "kd", "classifier_score")


class RealSet(NamedTuple):
    """What made images are held against."""

    features: Tensor | None  # n d; None where there are only statistics
    statistics: FeatureStatistics
    agreement: float | None = None  # of the judge with the classes of the real images


def looked_at(
    images: SetOfImages, network: FeatureNetwork | None, judge: Judge | None, state: PartialState, what: str
) -> Values:
    """Hash of each image, in their order, on the first process; features and probabilities of classes where there is a
    network, and what the judge says where there is one."""

    @torch.no_grad()
    def look(batch: Any) -> Values | None:
        pixels, labels = images.fetch(batch)
        if not len(pixels):
            return None
        on_device = pixels.to(state.device)
        found: Values = {"sha256": digests(pixels)}
        if network is not None:
            seen = network.see(on_device)
            found["features"] = seen.features.cpu().numpy()
            if seen.probabilities is not None:
                found["probabilities"] = seen.probabilities.cpu().numpy()
        if judge is not None:
            found["agrees"] = agrees(judge, on_device, labels)
        return found

    return of_all_batches(images.batches, look, state, what)


def agrees(judge: Judge, images: Tensor, labels: Tensor) -> np.ndarray:
    """Whether the judge finds the class of each image the most probable, 0 or 1; -1 where the image has none. images:
    uint8 b c H W. Raises UserError."""
    logits = judge(to_float(images))
    if len(labels) and int(labels.max()) >= logits.shape[-1]:
        raise UserError(
            f"the judge tells {logits.shape[-1]} classes apart, and images are of class {int(labels.max())}; name a "
            "judge of the classes that the prior was trained with"
        )
    chosen = logits.argmax(dim=-1).cpu()
    return (chosen == labels).int().masked_fill(labels < 0, -1).numpy()


def share_that_agrees(values: Values) -> float | None:
    known = values["agrees"][values["agrees"] >= 0] if "agrees" in values else np.empty(0)
    return float(known.mean()) if len(known) else None


def generation_figures(
    made: Values, real: RealSet, network: FeatureNetwork, device: torch.device
) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Figures, notes, and the settings that belong to the protocol."""
    names, count, others = names_for(network), len(made["features"]), real.statistics.count
    y = torch.from_numpy(made["features"]).to(device)
    x = None if real.features is None else real.features.to(device)
    smaller = min(count, others or count)
    tasks: dict[str, Callable[[], Any]] = {}
    if not frechet_is_refused(count, others, network.width):
        tasks["frechet"] = lambda: frechet_distance(FeatureStatistics.of(y), real.statistics)
    if x is not None and smaller > NEAREST_DENSITY:
        tasks["manifolds"] = lambda: manifolds(x, y, NEAREST, NEAREST_DENSITY)
    if x is not None and smaller >= SUBSET:
        tasks["kernel"] = lambda: kernel_distance(x, y, SUBSETS, SUBSET, SEED)
    elif x is not None and smaller > 1:
        tasks["kernel"] = lambda: (kernel_distance_of_all(x, y), None)
    if "probabilities" in made and count >= SPLITS:
        probabilities = torch.from_numpy(made["probabilities"])
        tasks["score"] = lambda: inception_score(probabilities, SPLITS, SEED)
    found = dict(zip(tasks, one_thread_each(lambda task: task(), list(tasks.values()), device), strict=True))

    figures: dict[str, Any] = {"made_images": count, "reference_images": others or None}
    notes, settings = notes_of_frechet(names.frechet, count, others, network.width), dict[str, Any]()
    if x is not None and "manifolds" not in tasks:
        notes.append(
            f"refused: precision, recall, density and coverage are left out: they ask for more than {NEAREST_DENSITY} "
            "images on each side"
        )
    if x is None:
        notes.append(
            f"note: {names.kernel}, precision, recall, density and coverage are left out: statistics are no images"
        )
    if "frechet" in found:
        figures[names.frechet] = found["frechet"]
    if "kernel" in found:
        figures[names.kernel], deviation = found["kernel"]
        settings[names.kernel] = "all pairs"
        if deviation is not None:
            figures[f"{names.kernel}_std_of_subsets"] = deviation
            settings[names.kernel] = f"{SUBSETS} subsets of {SUBSET}, seed {SEED}"
            notes += notes_of(names.kernel, trust.kernel(count, others, SUBSET))
    if "score" in found:
        figures[names.score], figures[f"{names.score}_std_of_splits"] = found["score"]
        settings[names.score] = f"{SPLITS} splits, shuffled by seed {SEED}"
        notes += notes_of(names.score, trust.inception_score(count, SPLITS, network.classes))
    if "manifolds" in found:
        figures |= found["manifolds"]._asdict()
        settings["precision_recall"] = f"{NEAREST} nearest neighbours"
        settings["density_coverage"] = f"{NEAREST_DENSITY} nearest neighbours"
        notes += notes_of("precision, recall, density, coverage", trust.manifolds(count, others, NEAREST))
    agreement = share_that_agrees(made)
    if agreement is None and "agrees" in made:
        notes.append("note: classifier_agreement is left out: no class was asked for in the made images")
    if agreement is not None:
        figures["classifier_agreement"] = agreement
        if real.agreement is not None:
            figures["classifier_agreement_of_reference"] = real.agreement
    return figures, notes, settings
