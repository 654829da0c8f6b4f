"""`zellige encode`: images become code shards."""

from __future__ import annotations

from dataclasses import replace

from pipelines.model_folders import stage_folder
from images.encoding import EncodeConfig
from stage1_vq.encode import encode


def encode_images(config: EncodeConfig) -> str:
    """As `stage1_vq.encode.encode`, where an assembled model stands for the autoencoder in it."""
    return encode(replace(config, model=str(stage_folder(config.model, "stage1"))))
