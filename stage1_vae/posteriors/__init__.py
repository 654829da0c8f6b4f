"""Posteriors by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer
from stage1_vae.posteriors.committed_rate import CommittedRateConfig, CommittedRateLayer
from stage1_vae.posteriors.diagonal import DiagonalGaussian, DiagonalGaussianConfig, DiagonalGaussianLayer
from stage1_vae.posteriors.full_covariance import FullCovariance, FullCovarianceConfig, FullCovarianceLayer
from stage1_vae.posteriors.inverse_autoregressive import (
    InverseAutoregressive,
    InverseAutoregressiveConfig,
    InverseAutoregressiveLayer,
)
from stage1_vae.posteriors.linear_flows import LinearFlows, LinearFlowsConfig, LinearFlowsLayer
from stage1_vae.posteriors.matrix_normal import MatrixNormalConfig, MatrixNormalLayer
from stage1_vae.posteriors.rank_one import RankOne, RankOneConfig, RankOneLayer
from stage1_vae.posteriors.von_mises_fisher import VonMisesFisher, VonMisesFisherConfig, VonMisesFisherLayer

PosteriorConfig = (
    DiagonalGaussianConfig
    | CommittedRateConfig
    | FullCovarianceConfig
    | RankOneConfig
    | InverseAutoregressiveConfig
    | LinearFlowsConfig
    | VonMisesFisherConfig
    | MatrixNormalConfig
)

POSTERIORS: dict[str, Any] = {  # classes of PosteriorLayer, each with a config class of its own
    "diagonal": (DiagonalGaussianLayer, DiagonalGaussianConfig),
    "committed_rate": (CommittedRateLayer, CommittedRateConfig),
    "full_covariance": (FullCovarianceLayer, FullCovarianceConfig),
    "rank_one": (RankOneLayer, RankOneConfig),
    "inverse_autoregressive": (InverseAutoregressiveLayer, InverseAutoregressiveConfig),
    "linear_flows": (LinearFlowsLayer, LinearFlowsConfig),
    "von_mises_fisher": (VonMisesFisherLayer, VonMisesFisherConfig),
    "matrix_normal": (MatrixNormalLayer, MatrixNormalConfig),
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
    "FullCovariance",
    "FullCovarianceConfig",
    "FullCovarianceLayer",
    "InverseAutoregressive",
    "InverseAutoregressiveConfig",
    "InverseAutoregressiveLayer",
    "LatentShape",
    "LinearFlows",
    "LinearFlowsConfig",
    "LinearFlowsLayer",
    "MatrixNormalConfig",
    "MatrixNormalLayer",
    "Posterior",
    "PosteriorConfig",
    "PosteriorLayer",
    "RankOne",
    "RankOneConfig",
    "RankOneLayer",
    "VonMisesFisher",
    "VonMisesFisherConfig",
    "VonMisesFisherLayer",
    "build_posterior",
]
