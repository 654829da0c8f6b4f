"""A small run of stage one and the images that it encodes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from images.datasets import DataConfig
from images.encoding import EncodeConfig
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import (
    NearestQuantizerConfig,
)


def tiny_vqvae() -> VQVAE:
    """Always the same weights, and a codebook that spreads over random images: equal codes mean equal pixels."""
    quantizer = NearestQuantizerConfig(codebook_size=300, dim=4)
    config = VQVAEConfig(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=quantizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = VQVAE(config, (8, 8))
        with torch.no_grad():
            autoencoder.initialise([torch.rand(500, 1, 8, 8) * 2 - 1])
    return autoencoder.eval()


def save_set(root: Path, per_class: int = 9) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 256, (10, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def data_of(root: Path, **changes: Any) -> DataConfig:
    defaults = {"path": str(root), "image_size": 8, "channels": 1, "validation_share": 0.2, "crop": "random"}
    return DataConfig(**{**defaults, "flip": True, **changes})


def save_run(run: Path, data: DataConfig | None) -> Path:
    """What a stage-one run leaves for `encode`: the model, and the config with its data."""
    tiny_vqvae().save_pretrained(run / "model")
    if data is not None:
        resolved = {"data": {**asdict(data)}}  # tuples become lists, as in a run's config.yaml
        (run / "config.yaml").write_text(yaml.safe_dump(resolved))
    return run


def config(run: Path, out: Path, **changes: Any) -> EncodeConfig:
    return EncodeConfig(
        **{"model": str(run), "out": str(out), "batch_size": 3, "shard_size": 5, "workers": 0, **changes}
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
