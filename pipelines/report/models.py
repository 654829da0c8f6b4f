"""The models of a report's subjects, loaded once; of what cannot be had, the reason in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.files import read_json
from common.model_io import PretrainedModel, load_pretrained
from pipelines.latents.models import KIND as LATENT
from pipelines.latents.models import VAES
from pipelines.latents.pipeline import LatentPipeline
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
            if isinstance(self.vae.prior, PretrainedModel):
                found["prior over latents"] = self.vae.prior
        return found


def load_models(subject: Subject, device: torch.device) -> Models:
    """The models of a subject. What is damaged is a reason, and the report goes on without it."""
    if subject.model is None:
        return Models(why_none="There is no model yet: train until the first checkpoint, train.save_every steps.")
    try:
        folder = any_model_folder(subject.model)
        return models_in(folder, device)
    except UserError as error:
        return Models(why_none=f"The model cannot be read: {error}.")


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


def pair_up(models: list[Models]) -> None:
    """A prior without its autoencoder takes it from another subject, where the fingerprint of one is what the prior
    recorded: both runs of a model can be named beside each other."""
    makers = {one.autoencoder.fingerprint(): one.autoencoder for one in models if one.autoencoder is not None}
    for one in models:
        if one.prior is None or one.autoencoder is not None:
            continue
        maker = makers.get(one.prior.stage1_fingerprint or "")
        if maker is not None:
            one.autoencoder, one.pipeline = maker, TwoStagePipeline(maker, one.prior)
