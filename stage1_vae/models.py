"""Likelihood VAEs of images by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.deep_latent_gaussian import DeepLatentGaussian, DeepLatentGaussianConfig
from stage1_vae.hierarchies.markov import MarkovConfig, MarkovHierarchy
from stage1_vae.hierarchies.nvae import NVAE, NVAEConfig
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.labels.m1m2 import M1M2, M1M2Config
from stage1_vae.labels.m2 import M2, M2Config
from stage1_vae.modalities.multimodal import Multimodal, MultimodalConfig
from stage1_vae.model import LikelihoodVAE
from stage1_vae.vae import VAE, VAEConfig

ModelConfig = (
    VAEConfig
    | MarkovConfig
    | DeepLatentGaussianConfig
    | NVAEConfig
    | M2Config
    | VDVAEConfig
    | MultimodalConfig
    | M1M2Config
)


MODELS: dict[str, Any] = {  # classes of LikelihoodVAE, each with a config class of its own
    "vae": (VAE, VAEConfig),
    "markov": (MarkovHierarchy, MarkovConfig),
    "deep_latent_gaussian": (DeepLatentGaussian, DeepLatentGaussianConfig),
    "nvae": (NVAE, NVAEConfig),
    "m2": (M2, M2Config),
    "vdvae": (VDVAE, VDVAEConfig),
    "multimodal": (Multimodal, MultimodalConfig),
    "m1m2": (M1M2, M1M2Config),
}
MODEL_CLASSES: dict[str, type[LikelihoodVAE]] = {kind: model for kind, (model, _) in MODELS.items()}
LABELLED = tuple(kind for kind, model in MODEL_CLASSES.items() if issubclass(model, LabelledVAE))  # that know classes


def build_model(config: ModelConfig, image_size: tuple[int, int], binarised: Binarised | None) -> LikelihoodVAE:
    """image_size: (H, W). Raises UserError for a size that the model cannot have."""
    model: LikelihoodVAE = MODELS[config.kind][0](config, image_size, binarised)
    return model
