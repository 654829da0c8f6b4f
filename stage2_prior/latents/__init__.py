"""Priors over the latents of a VAE, learned after it, by the `kind` of their config."""

from __future__ import annotations

from stage2_prior.latents.base import LatentPriorModel
from stage2_prior.latents.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from stage2_prior.latents.masked_autoregressive_flow import MaskedAutoregressiveFlow, MaskedAutoregressiveFlowConfig
from stage2_prior.latents.second_vae import SecondVAE, SecondVAEConfig

LATENT_PRIORS: dict[str, type[LatentPriorModel]] = {
    "gaussian_mixture": GaussianMixture,
    "masked_autoregressive_flow": MaskedAutoregressiveFlow,
    "second_vae": SecondVAE,
}
LatentPriorModelConfig = GaussianMixtureConfig | MaskedAutoregressiveFlowConfig | SecondVAEConfig

__all__ = [
    "LATENT_PRIORS",
    "GaussianMixture",
    "GaussianMixtureConfig",
    "LatentPriorModel",
    "LatentPriorModelConfig",
    "MaskedAutoregressiveFlow",
    "MaskedAutoregressiveFlowConfig",
    "SecondVAE",
    "SecondVAEConfig",
]
