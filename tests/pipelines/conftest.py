"""Tiny models and images that the pipeline tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.pictures import to_pil
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage2_prior.priors import Transformer, TransformerConfig


def make_autoencoder(codebook_size: int = 16, image_size: tuple[int, int] = (16, 16), channels: int = 1) -> VQVAE:
    """Untrained: stride 4, so 4x4 codes."""
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=codebook_size, dim=4)
    config = VQVAEConfig(channels=channels, width=8, residual_width=8, residual_blocks=1, quantizer=quantizer)
    return VQVAE(config, image_size).eval()


def make_prior(autoencoder: VQVAE, num_classes: int = 3) -> Transformer:
    torch.manual_seed(1)
    return Transformer(
        TransformerConfig(layers=1, width=16, heads=2),
        autoencoder.code_spec(),
        num_classes,
        class_names=tuple(f"class {i}" for i in range(num_classes)) or None,
        stage1_fingerprint=autoencoder.fingerprint(),
    ).eval()


def make_pipeline(num_classes: int = 3) -> TwoStagePipeline:
    autoencoder = make_autoencoder()
    return TwoStagePipeline(autoencoder, make_prior(autoencoder, num_classes))


def some_images(count: int = 3) -> torch.Tensor:
    """count 1 16 16, in [-1, 1]"""
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with `some_images` as 0.png, 1.png and 2.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(some_images()):
        to_pil(image).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an assembled tiny model with three classes."""
    return make_pipeline().save_pretrained(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of 60 synthetic 16x16 "digits" of three classes: a bright square in one of three corners."""
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = generator.integers(0, 60, (60, 16, 16), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = [(1, 1), (1, 9), (9, 1)][label]
        image[top : top + 6, left : left + 6] = 230
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, images=images, labels=labels)
    return path
