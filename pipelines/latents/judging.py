"""How good a VAE is on test images: log p, what bounds it, its rate and distortion, and pictures of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

import stage1_vae.evaluation
from common.errors import UserError
from common.progress import with_progress
from common.wording import counted
from images.datasets import to_float
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.gathering import Values, joined, know_all_bad_images, one_thread, results_of_all
from pipelines.evaluation.images import check_some, digests, evenly, images_of_size, in_batches, with_classes_of
from pipelines.evaluation.outcome import Outcome
from pipelines.evaluation.protocol import of_images
from pipelines.evaluation.reconstruction import Reconstruction
from pipelines.figures import FEW
from pipelines.pictures import contact_sheet, in_columns, save_png
from stage1_vae.aggregate import Aggregate, AggregateFigures
from stage1_vae.binarise import Binarisation, Binarised, NumberedImages
from stage1_vae.evaluation import ImageFigures, Mean, active_units, draws_at_once, judge, mean_of
from stage1_vae.hierarchies.base import HierarchicalVAE
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.likelihoods import bits_per_dimension
from stage1_vae.model import LikelihoodVAE
from stage1_vae.pictures import (
    analogy_sheet,
    has_plane,
    latent_plane,
    latent_walks,
    moves_of,
    progressive,
    reconstructions,
    samples,
    spread,
    straightened,
)
from stage1_vae.vae import VAE

TITLE = "likelihood"
DRAWS = 100  # of the latents of each image, when nothing else is said
LOW = 0.1  # nats by which log p may be too low before that is said
FEW_DRAWS = 10  # effective ones, of half of the images, below which log p and its error are not to be trusted
INFORMED = 0.01  # nats of KL from which on a unit of a group says something that its prior, given those above, does not
SHOWN = 10  # images in a row of a picture, and the KL of numbers that are printed


def binarisation_of(model: LikelihoodVAE, asked: Binarisation | None) -> Binarised:
    """How test images are made black and white: as is asked for, or as those of the training were. Raises UserError
    where neither says."""
    if asked is not None:
        return Binarised(asked, 0 if model.binarised is None else model.binarised.seed)
    if model.binarised is not None:
        return model.binarised
    if model.config.likelihood.kind == "bernoulli":
        raise UserError(
            "the model does not record how its images were made black and white, as an earlier version trained it, and "
            "its likelihood is of such ones: give --binarised threshold, once or anew, as its training had it, or none"
        )
    return Binarised("none")


def judge_vae(
    config: EvaluateConfig, model: LikelihoodVAE, reconstruction: Reconstruction, outcome: Outcome, state: PartialState
) -> Values:
    """Adds the figures of test images to `outcome`, on the first process, and returns what each image gave. Raises
    UserError."""
    how = binarisation_of(model, config.binarised)
    data = config.data
    images = images_of_size(str(data.path), data.split, data.max_bad_share, model.image_size, model.config.channels)
    if isinstance(model, LabelledVAE):
        images = with_classes_of(images, model.class_names)
    chosen = evenly(config.num, len(images))
    numbered, draws = NumberedImages(images, how.how, how.seed, training=False), config.draws or DRAWS
    seen, values = measured(config, model, reconstruction, numbered, chosen, draws, state)
    know_all_bad_images(images, state)
    if not state.is_main_process:
        return values
    check_some(values, len(chosen), str(data.path))
    batches = in_batches(chosen, config.batch_size)
    judged = Judged(model, numbered, batches, stage1_vae.evaluation.joined(seen), values)
    figures, notes = figures_and_notes(model, judged, how, draws)
    if "psnr" in values:
        figures |= {name: value for name, value in reconstruction.figures(values).items() if name != "psnr"}
        notes += reconstruction.notes(values)
        outcome.labels |= reconstruction.labels(values)
    outcome.add(TITLE, figures, notes)
    outcome.protocol["images"] = {
        **of_images(images, data.split, values, len(chosen)),
        "binarised": how.how,
        "binarised_seed": how.seed,
        "draws": draws,
    }
    outcome.unread = images.bad_images.summary()
    log_p, bound = figures["log_p"], figures["elbo"]
    outcome.says += [
        f"log p {log_p.value:.2f} ± {log_p.images_error:.2f} nats",
        f"ELBO {bound.value:.2f}",
        f"{figures['active_units']} of {math.prod(model.shape)} units active ({how})",
    ]
    if "accuracy" in figures:
        outcome.says.insert(0, f"{100 * figures['accuracy'].value:.2f}% of classes told right")
    if config.pictures is not None:
        write_pictures(model, judged, Path(config.pictures))
        outcome.says[-1] += f", pictures in {config.pictures}"
    return values


def measured(
    config: EvaluateConfig,
    model: LikelihoodVAE,
    reconstruction: Reconstruction,
    data: NumberedImages,
    chosen: list[int],
    draws: int,
    state: PartialState,
) -> tuple[list[ImageFigures], Values]:
    """What draws of the latents of every image gave, batch after batch, and other numbers of each, on the first
    process."""
    device, channels = state.device, model.config.channels
    at_once = draws_at_once(model, torch.zeros(1, channels, *model.image_size, device=device))

    def look_at(indices: Sequence[int]) -> tuple[ImageFigures, Values] | None:
        batch, found = data.fetch_readable(indices, indices)
        if not found:
            return None
        images, numbers = to_float(batch["images"]).to(device), batch["numbers"].tolist()
        values = {"labels": batch["labels"].numpy(), "sha256": digests(batch["images"])}
        if isinstance(model, LabelledVAE):
            with torch.inference_mode():
                values["told"] = model.class_log_probabilities(images).argmax(dim=-1).cpu().numpy()
        if reconstruction.network is not None:
            values["features"] = reconstruction.network(batch["images"].to(device)).cpu().numpy()
        if not model.mean_is_drawn:
            with torch.inference_mode():
                decoded = model.decode(model.encode(images))
                measures = reconstruction.measure(images, decoded)
            values |= {name: value.cpu().numpy() for name, value in measures.items()}
        return judge(model, images, numbers, draws, config.seed, at_once=at_once), values

    parts = results_of_all(in_batches(chosen, config.batch_size), look_at, state, "batches")
    found = [part for part in parts if part is not None]
    return [figures for figures, _ in found], joined([values for _, values in found])


class Judged:
    """Test images, and what the draws of their latents gave."""

    def __init__(
        self,
        model: LikelihoodVAE,
        data: NumberedImages,
        batches: Sequence[Sequence[int]],
        images: ImageFigures,
        values: Values,
    ) -> None:
        """images, values: of all of them."""
        self.device = next(model.parameters()).device
        self.data, self.indices, self.images = data, batches, images
        self.psnr = torch.from_numpy(values["psnr"]) if "psnr" in values else None  # of the mean image, if there is one
        self.labels = values["labels"]
        self.told = values.get("told")  # the class of each image by q(y|x), of a VAE that knows classes
        self.aggregate = self.aggregate_of(model) if isinstance(model, VAE) else None

    def aggregate_of(self, model: VAE) -> AggregateFigures:
        aggregate = Aggregate(self.images, model.prior, model.shape)
        with one_thread():
            for pixels in self.batches("posteriors"):
                with torch.inference_mode():
                    aggregate.add(model.posterior(pixels))
            return aggregate.figures()

    @property
    def count(self) -> int:
        return len(self.images.log_p)

    def batches(self, what: str) -> Iterator[Tensor]:
        """Images, float b c H W in [-1, 1] on the model's device."""
        for indices in with_progress(self.indices, what, size=len):
            batch, found = self.data.fetch_readable(indices, indices)
            if found:
                yield to_float(batch["images"]).to(self.device)

    def first(self, count: int) -> Tensor:
        """The first images that can be read, as `batches` gives them."""
        found: list[Tensor] = []
        for images in self.batches("shown"):
            found.append(images)
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]


def figures_and_notes(
    model: LikelihoodVAE, judged: Judged, how: Binarised, draws: int
) -> tuple[dict[str, Any], list[str]]:
    """Figures by name, in nats where the name says no other unit, and what a person should know before they quote
    them."""
    found, whole = judged.images, judged.aggregate
    kl = [group.mean(dim=0) for group in found.kl]
    active = [int(active_units(means).sum()) for means in found.means]  # of each group
    figures: dict[str, Any] = {
        "images": judged.count,
        "draws": draws,
        "log_p": mean_of(found.log_p, found.log_p_error),
        "elbo": mean_of(found.elbo, found.elbo_error),
        "gap": mean_of(found.gap, found.gap_error),
        "distortion": mean_of(-found.log_likelihood, found.log_likelihood_error),
        "rate": mean_of(found.total_kl),
    }
    as_modelled = how.how != "none" or model.config.likelihood.kind != "bernoulli"
    if model.discrete and as_modelled:
        dimensions = model.config.channels * math.prod(model.image_size)
        for name, source in (("bits_per_dimension", "log_p"), ("elbo_bits_per_dimension", "elbo")):
            figures[name] = Mean(
                float(bits_per_dimension(torch.tensor(-figures[source].value), dimensions, discrete=True)),
                *(error / (dimensions * math.log(2)) for error in figures[source][1:]),
            )
    figures |= {f"L_{k}": mean_of(bound, found.bound_errors[k]) for k, bound in found.bounds.items()}
    if judged.psnr is not None:
        figures["psnr"] = mean_of(judged.psnr, torch.zeros_like(judged.psnr))
    if judged.told is not None and (judged.labels >= 0).any():
        known = judged.labels >= 0
        figures["labelled_images"] = int(known.sum())
        figures["accuracy"] = mean_of(torch.from_numpy(judged.told == judged.labels)[known].double())
    figures["active_units"] = sum(active)
    if len(kl) > 1:
        figures |= {f"active_units_of_group_{place}": count for place, count in enumerate(active)}
        figures |= {f"informed_units_of_group_{place}": int((group > INFORMED).sum()) for place, group in enumerate(kl)}
        figures |= {f"kl_of_group_{place}": float(group.sum()) for place, group in enumerate(kl)}
    else:
        figures["kl_per_dimension"] = kl[0].tolist()
    if whole is not None:
        figures["mutual_information"] = whole.mutual_information
        figures["aggregate_kl"] = whole.aggregate_kl
        figures["total_correlation"] = whole.total_correlation
        figures["dimension_kl"] = None if whole.dimension_kl is None else sum(whole.dimension_kl)
    figures["effective_draws"] = float(found.effective_draws.median())
    return figures, [*notes_of(model, judged, how, draws, sum(active), as_modelled=as_modelled)]


def notes_of(
    model: LikelihoodVAE, judged: Judged, how: Binarised, draws: int, active: int, *, as_modelled: bool
) -> Iterator[str]:
    found = judged.images
    if not as_modelled:
        yield "warning: the likelihood is of black and white and the images are grey: none of these is a likelihood"
    elif not model.discrete:
        yield "note: the likelihood is a density of pixels in [-1, 1], of which there are no bits per dimension here"
    if model.binarised is not None and how.how != model.binarised.how:
        yield f"note: the model was trained on other images than these, {model.binarised}"
    if (numbers := math.prod(model.shape)) >= 2 and judged.count >= 2 and active < 2:
        yield (
            f"warning: {active} of {numbers} units are active: the posterior has collapsed onto the prior, and what is "
            'decoded hardly depends on the image; "My posterior collapsed" (docs/collapse.md) measures what helps'
        )
    low = float(found.log_p_error.square().mean()) / 2
    if draws > 1 and float(found.effective_draws.median()) < min(FEW_DRAWS, draws / 2):
        yield (
            f"warning: log p of half of the images hangs on {float(found.effective_draws.median()):.1f} of {draws} "
            "draws or fewer: it is too low by more than its error says; give more --draws"
        )
    elif draws > 1 and low > LOW:
        yield f"note: log p is too low by some {low:.2f} nats on average; more --draws make it less"
    yield (
        "note: whether the model was trained on these images is not known, as a VAE does not record its training "
        "images; name images that it has not seen"
    )
    whole = judged.aggregate
    if whole is not None and whole.draws < judged.count:
        yield (
            f"note: mutual_information, aggregate_kl and total_correlation are means over {whole.draws} "
            f"draws only, under the posteriors of all {judged.count} images"
        )
    if whole is not None and judged.count > 1 and whole.mutual_information.value > 0.8 * math.log(judged.count):
        yield (
            f"note: mutual_information cannot be more than log {judged.count} = {math.log(judged.count):.2f} nats for "
            "so many images: of more images it would be larger, and aggregate_kl smaller"
        )
    if judged.count < FEW:
        yield f"note: these are figures of {counted(judged.count, 'image')} only; see what they differ by for others"


def print_figures(figures: dict[str, Any], how: Binarised, labels: Mapping[str, str]) -> None:
    """One line each, with standard errors, what the images were like, and labels of some."""
    for name, value in figures.items():
        if value is None:
            print(f"{name:<26}not known for this kind of posterior or prior")
        elif isinstance(value, Mean):
            errors = [(value.draws_error, "draws"), (value.images_error, "images")]
            said = "".join(f" ± {error:.4f} by {by}" for error, by in errors if 0 < error < math.inf)
            print(f"{name:<26}{value.value:.4f}{said}  ({how})")
        elif isinstance(value, list):
            largest = sorted(value, reverse=True)
            more = f" and {len(value) - SHOWN} smaller ones" if len(value) > SHOWN else ""
            print(f"{name:<26}{' '.join(f'{one:.2f}' for one in largest[:SHOWN])}{more}  ({how})")
        else:
            label = f"{labels[name]}; {how}" if name in labels else str(how)
            print(f"{name:<26}{value:.4f}  ({label})" if isinstance(value, float) else f"{name:<26}{value}")


def as_record(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON has them: each mean with its two standard errors under names of their own, null for unknown."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mean):
            found[name] = value.value
            for by, error in (("draws", value.draws_error), ("images", value.images_error)):
                found[f"{name}_error_by_{by}"] = error if math.isfinite(error) else None
        else:
            found[name] = value
    return found


def write_pictures(model: LikelihoodVAE, judged: Judged, folder: Path) -> None:
    """samples.png, reconstructions.png, walks.png, or analogies.png of a VAE that knows classes, plane.png of one that
    has such, levels.png of a hierarchy, and straight.png of a spatial-VAE."""
    shown = judged.first(2 * SHOWN)
    means = torch.cat(judged.images.means, dim=1)
    pictures = {
        "samples": contact_sheet(in_columns(samples(model, SHOWN**2), SHOWN)),
        "reconstructions": reconstructions(model, shown, SHOWN),
    }
    if isinstance(model, LabelledVAE):
        pictures["analogies"] = analogy_sheet(model, shown[:SHOWN])
    else:
        on_device = means.float().to(judged.device).unflatten(1, model.shape)
        pictures["walks"] = latent_walks(model, shown[0], spread(model, on_device))
    if has_plane(model):
        pictures["plane"] = latent_plane(model, means.float(), judged.labels)
    if isinstance(model, HierarchicalVAE):
        pictures["levels"] = progressive(model, shown[:SHOWN])
    if moves_of(model):
        pictures["straight"] = straightened(model, shown[:SHOWN])
    for name, picture in pictures.items():
        save_png(picture, folder / f"{name}.png")
