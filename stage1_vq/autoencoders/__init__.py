"""Autoencoders by the `kind` of their config and of their model folder."""

from __future__ import annotations

from stage1_vq.autoencoders.base import Autoencoder, Stage1Output
from stage1_vq.autoencoders.vqvae import VQVAE, VQVAEConfig

AutoencoderConfig = VQVAEConfig

AUTOENCODERS: dict[str, type[Autoencoder]] = {
    "vqvae": VQVAE,
}

__all__ = [
    "AUTOENCODERS",
    "VQVAE",
    "Autoencoder",
    "AutoencoderConfig",
    "Stage1Output",
    "VQVAEConfig",
]
