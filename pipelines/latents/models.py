"""Which models are likelihood VAEs, and where they lie."""

from __future__ import annotations

from pathlib import Path

from common.files import read_json
from common.model_io import CONFIG_NAME, load_pretrained
from pipelines.model_folders import INDEX_NAME, any_model_folder, stage_folder
from stage1_vae.vae import VAE

KIND = "latent"  # of an assembled model of a VAE and a prior over its latents
VAES = {VAE.kind: VAE}


def is_vae(folder_or_hub_id: str | Path) -> bool:
    """Whether a model, assembled or single, draws images from continuous latents. Raises UserError where there is no
    model."""
    folder = any_model_folder(folder_or_hub_id)
    if (folder / INDEX_NAME).is_file():
        return read_json(folder / INDEX_NAME).get("kind") == KIND
    return read_json(folder / CONFIG_NAME).get("kind") in VAES


def load_vae(folder_or_hub_id: str | Path) -> VAE:
    """The VAE of an assembled model, of a run or model folder, or of a hub id. Raises UserError."""
    return load_pretrained(stage_folder(folder_or_hub_id, "stage1"), VAES)
