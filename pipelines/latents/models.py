"""Which models are likelihood VAEs, where they lie, and which latents and priors belong to which."""

from __future__ import annotations

from pathlib import Path

import torch

from codes.latents import LatentDataset
from common.errors import UserError
from common.files import read_json
from common.model_io import CONFIG_NAME, load_pretrained
from pipelines.model_folders import INDEX_NAME, any_model_folder, stage_folder
from stage1_vae.encode import spec_of
from stage1_vae.model import LikelihoodVAE
from stage1_vae.models import MODEL_CLASSES
from stage2_prior.latents import LATENT_PRIORS, LatentPriorModel

KIND = "latent"  # of an assembled model of a VAE and a prior over its latents
VAES = MODEL_CLASSES


def is_vae(folder_or_hub_id: str | Path) -> bool:
    """Whether a model, assembled or single, draws images from continuous latents. Of what is no model it is not said:
    who reads it next knows what it should be."""
    try:
        folder = any_model_folder(folder_or_hub_id)
    except UserError:
        return False
    if (folder / INDEX_NAME).is_file():
        return read_json(folder / INDEX_NAME).get("kind") == KIND
    return read_json(folder / CONFIG_NAME).get("kind") in VAES


def load_vae(
    folder_or_hub_id: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None
) -> LikelihoodVAE:
    """The VAE of an assembled model, of a run or model folder, or of a hub id. Arguments and errors: those of
    `common.model_io.load_pretrained`."""
    return load_pretrained(stage_folder(folder_or_hub_id, "stage1", revision), VAES, device=device)


def load_latent_prior(
    folder_or_hub_id: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None
) -> LatentPriorModel:
    """The prior over latents of an assembled model, of a run or model folder, or of a hub id. Arguments and errors:
    those of `common.model_io.load_pretrained`."""
    return load_pretrained(stage_folder(folder_or_hub_id, "stage2", revision), LATENT_PRIORS, device=device)


def check_fit(vae: LikelihoodVAE, prior: LatentPriorModel) -> None:
    """Raises UserError unless `prior` was trained on latents of exactly this VAE."""
    ours, theirs = spec_of(vae), prior.latent_spec
    if ours != theirs:
        raise UserError(
            f"the two stages do not fit: the VAE makes {ours.describe()}, the prior was trained on "
            f"{theirs.describe()}; name the run of the VAE whose latents the prior was trained on"
        )
    recorded, actual = prior.stage1_fingerprint, vae.fingerprint()
    if recorded is not None and recorded != actual:
        raise UserError(
            f"the two stages do not fit: the prior was trained on latents of VAE {recorded[:12]}, this one is "
            f"{actual[:12]} (same shape, other weights); name the run of the VAE whose latents the prior was trained "
            "on, or encode and train stage two again"
        )


def check_latents_of(latents: LatentDataset, vae: LikelihoodVAE) -> None:
    """Raises UserError unless this VAE made the latents; of latents that do not say who did, only their shape is
    compared."""
    recorded, actual, spec = latents.stage1_fingerprint, vae.fingerprint(), spec_of(vae)
    if latents.latent_spec != spec or recorded not in ("", actual):
        raise UserError(
            f"{latents.folder} holds latents of VAE {recorded[:12]}, {latents.latent_spec.describe()}, expected those "
            f"of {actual[:12]}, {spec.describe()}; encode images with this model"
        )
