"""Priors over latents that a VAE trains with, by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.priors.autoregressive_gaussian import AutoregressiveGaussian, AutoregressiveGaussianConfig
from stage1_vae.priors.base import LatentPrior
from stage1_vae.priors.clusters import (
    ClusteredPrior,
    Clusters,
    ClustersConfig,
    GaussianMixture,
    GaussianMixtureConfig,
)
from stage1_vae.priors.standard_normal import StandardNormal, StandardNormalConfig
from stage1_vae.priors.uniform_sphere import UniformSphere, UniformSphereConfig
from stage1_vae.priors.vamp import VampPrior, VampPriorConfig

LatentPriorConfig = (
    StandardNormalConfig
    | AutoregressiveGaussianConfig
    | UniformSphereConfig
    | VampPriorConfig
    | GaussianMixtureConfig
    | ClustersConfig
)

PRIORS: dict[str, Any] = {  # classes of LatentPrior, each with a config class of its own
    "standard_normal": (StandardNormal, StandardNormalConfig),
    "autoregressive_gaussian": (AutoregressiveGaussian, AutoregressiveGaussianConfig),
    "uniform_sphere": (UniformSphere, UniformSphereConfig),
    "vamp": (VampPrior, VampPriorConfig),
    "gaussian_mixture": (GaussianMixture, GaussianMixtureConfig),
    "clusters": (Clusters, ClustersConfig),
}

__all__ = [
    "PRIORS",
    "AutoregressiveGaussian",
    "AutoregressiveGaussianConfig",
    "ClusteredPrior",
    "Clusters",
    "ClustersConfig",
    "GaussianMixture",
    "GaussianMixtureConfig",
    "LatentPrior",
    "LatentPriorConfig",
    "StandardNormal",
    "StandardNormalConfig",
    "UniformSphere",
    "UniformSphereConfig",
    "VampPrior",
    "VampPriorConfig",
]
