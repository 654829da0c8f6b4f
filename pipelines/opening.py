"""A pipeline of whatever a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch

from common.errors import UserError
from common.files import read_json
from common.model_io import CONFIG_NAME
from pipelines.latents.models import KIND as LATENT_KIND
from pipelines.latents.models import VAES
from pipelines.latents.pipeline import LatentPipeline
from pipelines.model_card import CardOptions, write_card
from pipelines.model_folders import INDEX_NAME, any_model_folder
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import AUTOENCODERS
from stage2_prior.latents import LATENT_PRIORS


def write_model_card(folder: str | Path, hub_id: str | None = None, **card: Unpack[CardOptions]) -> Path:
    """Writes README.md and a picture of samples into the folder of a model, as `push_to_hub` would upload them, and
    returns the card's path: to be read, and edited, before it goes. hub_id: what it calls the model; left out, the
    folder. Raises UserError, as `pipelines.model_card.write_card`."""
    pipeline = from_pretrained(folder)
    if pipeline.source is None or not Path(folder).exists():
        raise UserError(f"{folder} is no folder here, expected one of a model; download it, or name another")
    return write_card(pipeline.source, pipeline, hub_id or str(folder), card)


def from_pretrained(
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> TwoStagePipeline | LatentPipeline:
    """The pipeline of an assembled model, of a quickstart run, or of a VAE, by what the folder holds: both kinds
    `generate`, `stream`, `encode`, `decode`, `reconstruct` and `interpolate`. Arguments: those of
    `TwoStagePipeline.from_pretrained`. Raises UserError, also for an autoencoder or a prior alone."""
    folder = any_model_folder(folder_or_hub_id, revision)
    if (folder / INDEX_NAME).is_file():
        kind = read_json(folder / INDEX_NAME).get("kind")
        opened: type[TwoStagePipeline] | type[LatentPipeline] = (
            LatentPipeline if kind == LATENT_KIND else TwoStagePipeline
        )
        return opened.from_pretrained(folder, device=device, dtype=dtype)
    kind = read_json(folder / CONFIG_NAME).get("kind")
    if kind not in VAES:
        stage, loader = "stage two", "load_latent_prior" if kind in LATENT_PRIORS else "load_prior"
        if kind in AUTOENCODERS:
            stage, loader = "stage one", "load_autoencoder"
        raise UserError(
            f"{folder_or_hub_id} is a model of {stage} alone ({kind}), expected both stages; put them together by "
            f"`zellige assemble --stage1 RUN --stage2 RUN --out MODEL`, or open it with {loader}"
        )
    return LatentPipeline.from_pretrained(folder, device=device, dtype=dtype)
