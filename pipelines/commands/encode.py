"""`zellige encode`: images become code shards, or latent shards where the model is a VAE."""

from __future__ import annotations

from dataclasses import replace

import stage1_vae.encode
import stage1_vq.encode
from images.encoding import EncodeConfig
from pipelines.latents.models import is_vae
from pipelines.model_folders import stage_folder


def encode_images(config: EncodeConfig) -> str:
    """As `stage1_vq.encode.encode`, or that of `stage1_vae`, where an assembled model stands for the one in it."""
    encode = stage1_vae.encode.encode if is_vae(config.model) else stage1_vq.encode.encode
    return encode(replace(config, model=str(stage_folder(config.model, "stage1"))))
