"""Posteriors by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer
from stage1_vae.posteriors.committed_rate import CommittedRateConfig, CommittedRateLayer
from stage1_vae.posteriors.diagonal import DiagonalGaussian, DiagonalGaussianConfig, DiagonalGaussianLayer

PosteriorConfig = DiagonalGaussianConfig | CommittedRateConfig

POSTERIORS: dict[str, Any] = {  # classes of PosteriorLayer, each with a config class of its own
    "diagonal": (DiagonalGaussianLayer, DiagonalGaussianConfig),
    "committed_rate": (CommittedRateLayer, CommittedRateConfig),
}


def build_posterior(config: PosteriorConfig, shape: LatentShape) -> PosteriorLayer:
    """shape: of an image's latents, (d,) or (c, h, w). Raises UserError where the posterior has none of that shape."""
    return POSTERIORS[config.kind][0](config, shape)


__all__ = [
    "POSTERIORS",
    "CommittedRateConfig",
    "CommittedRateLayer",
    "DiagonalGaussian",
    "DiagonalGaussianConfig",
    "DiagonalGaussianLayer",
    "Draws",
    "LatentShape",
    "Posterior",
    "PosteriorConfig",
    "PosteriorLayer",
    "build_posterior",
]
