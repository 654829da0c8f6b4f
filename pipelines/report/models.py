"""The models of a report's subjects, loaded once; of what cannot be had, the reason in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import read_json
from common.model_io import PretrainedModel, load_pretrained
from pipelines.latents.models import KIND as LATENT
from pipelines.latents.models import VAES
from pipelines.latents.pipeline import LatentPipeline
from pipelines.model_card import fingerprints_in, known_fingerprints
from pipelines.model_folders import INDEX_NAME, any_model_folder
from pipelines.report.collect import Subject, kind_of_model
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.priors import PRIORS, Prior


@dataclass
class Models:
    """Of one subject. Where one is None, a `why_no_...` says what to give."""

    autoencoder: Autoencoder | None = None
    prior: Prior | None = None
    pipeline: TwoStagePipeline | None = None
    vae: LatentPipeline | None = None
    of_latents: bool = False  # whether there are latents and no codes
    why_none: str = ""  # why there is no model at all

    @cached_property
    def autoencoder_mark(self) -> str:
        """Fingerprint of the autoencoder; empty where there is none."""
        return "" if self.autoencoder is None else self.autoencoder.fingerprint()

    @cached_property
    def prior_mark(self) -> str:
        return "" if self.prior is None else self.prior.fingerprint()

    @property
    def why_no_autoencoder(self) -> str:
        return self.why_none or (
            "A prior alone makes no images: name the assembled model, or the run of stage one beside this one."
        )

    @property
    def why_no_pipeline(self) -> str:
        if self.why_none:
            return self.why_none
        if self.prior is None and not self.of_latents:
            return (
                "Stage one alone draws nothing new: name an assembled model, or the run of its prior beside this one."
            )
        return self.why_no_autoencoder

    @property
    def parts(self) -> dict[str, PretrainedModel]:
        """The models by what they are."""
        named = {"autoencoder": self.autoencoder, "prior": self.prior}
        found: dict[str, PretrainedModel] = {name: part for name, part in named.items() if part is not None}
        if self.vae is not None:
            found["VAE"] = self.vae.vae
            if self.vae.prior is not None:
                found["prior over latents"] = self.vae.prior
        return found


Pair = tuple[Subject, Models]


def load_models(subject: Subject, device: torch.device) -> Models:
    """The models of a subject. What is damaged is a reason, and the report goes on without it."""
    if subject.model is None:
        return Models(why_none="There is no model yet: train until the first checkpoint, train.save_every steps.")
    try:
        folder = any_model_folder(subject.model)
        models = models_in(folder, device)
    except UserError as error:
        return Models(why_none=f"The model cannot be read: {error}.")
    if subject.evaluation is not None and not is_of(subject.evaluation, models):
        subject.evaluation = None
        subject.notes.append(
            "the evaluation.json that lies there is left out: its figures are of another model, or of an earlier state "
            "of this one; evaluate it anew"
        )
    return models


def is_of(evaluation: Mapping[str, Any], models: Models) -> bool:
    """Whether figures are of these models, as far as the protocol tells of which they are."""
    protocol = evaluation.get("protocol")
    recorded = fingerprints_in(protocol.get("model")) if isinstance(protocol, dict) else set()
    pipeline = models.pipeline or models.vae
    known = set() if pipeline is None else known_fingerprints(pipeline)
    known |= {part.fingerprint() for part in models.parts.values()}
    if models.prior is not None and models.prior.stage1_fingerprint:
        known.add(models.prior.stage1_fingerprint)
    return recorded <= known if known else True


def models_in(folder: Path, device: torch.device) -> Models:
    """Raises UserError."""
    if (folder / INDEX_NAME).is_file():
        if read_json(folder / INDEX_NAME).get("kind") == LATENT:
            return Models(vae=LatentPipeline.from_pretrained(folder).to(device), of_latents=True)
        pipeline = TwoStagePipeline.from_pretrained(folder).to(device)
        return Models(pipeline.autoencoder, pipeline.prior, pipeline)
    kind = kind_of_model(folder)
    if kind in VAES:
        return Models(vae=LatentPipeline.from_pretrained(folder).to(device), of_latents=True)
    if kind in LATENT_PRIORS:
        return Models(of_latents=True)
    if kind in PRIORS and kind not in AUTOENCODERS:
        return Models(prior=load_pretrained(folder, PRIORS).to(device))
    return Models(autoencoder=load_pretrained(folder, AUTOENCODERS).to(device))


def put_together(pairs: list[Pair]) -> list[Pair]:
    """The parts of one system as one subject: the run of an autoencoder, the run of a prior over its codes and the
    assembled model of both may be named beside each other, and are told by their fingerprints. An autoencoder on which
    several priors stand stays a subject of its own, and all of them are drawn with it."""
    pairs = without_parts(pairs, is_prior_of)
    makers = {models.autoencoder_mark: models.autoencoder for _, models in pairs if models.autoencoder is not None}
    for _, models in pairs:
        if models.prior is not None and models.autoencoder is None:
            maker = makers.get(models.prior.stage1_fingerprint or "")
            if maker is not None:
                models.autoencoder, models.pipeline = maker, TwoStagePipeline(maker, models.prior)
    pairs = without_parts(pairs, is_autoencoder_of)
    for number, (subject, _) in enumerate(pairs):
        subject.number = number
    return pairs


def without_parts(pairs: list[Pair], is_part: Callable[[Models, Models], bool]) -> list[Pair]:
    """The pairs but those that are part of exactly one other, which takes over what is known of them."""
    kept = []
    for subject, models in pairs:
        owners = [owner for owner, whole in pairs if whole is not models and is_part(models, whole)]
        if len(owners) == 1:
            absorb(owners[0], subject)
        else:
            kept.append((subject, models))
    return kept


def is_prior_of(part: Models, whole: Models) -> bool:
    alone = part.prior is not None and part.autoencoder is None
    return alone and whole.pipeline is not None and part.prior_mark == whole.prior_mark


def is_autoencoder_of(part: Models, whole: Models) -> bool:
    alone = part.autoencoder is not None and part.prior is None
    return alone and whole.pipeline is not None and part.autoencoder_mark == whole.autoencoder_mark


def absorb(subject: Subject, part: Subject) -> None:
    """Makes what is known of a part known of the whole."""
    subject.runs = tuple(sorted((*subject.runs, *part.runs), key=lambda run: run.stage))
    subject.codes = subject.codes or part.codes
    subject.evaluation = subject.evaluation or part.evaluation
    subject.notes += part.notes
    if part.what not in subject.what:
        subject.what += f", {part.what}"
    subject.given_parts += (part.given,)
