"""Likelihoods by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.likelihoods.base import Likelihood, bits_per_dimension, dequantised
from stage1_vae.likelihoods.bernoulli import Bernoulli, BernoulliConfig
from stage1_vae.likelihoods.categorical import Categorical, CategoricalConfig
from stage1_vae.likelihoods.gaussian import Gaussian, GaussianConfig
from stage1_vae.likelihoods.logistic_mixture import LogisticMixture, LogisticMixtureConfig

LikelihoodConfig = BernoulliConfig | GaussianConfig | CategoricalConfig | LogisticMixtureConfig

LIKELIHOODS: dict[str, Any] = {  # classes of Likelihood, each with a config class of its own
    "bernoulli": (Bernoulli, BernoulliConfig),
    "gaussian": (Gaussian, GaussianConfig),
    "categorical": (Categorical, CategoricalConfig),
    "logistic_mixture": (LogisticMixture, LogisticMixtureConfig),
}


def build_likelihood(config: LikelihoodConfig, channels: int) -> Likelihood:
    return LIKELIHOODS[config.kind][0](config, channels)


__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "BernoulliConfig",
    "Categorical",
    "CategoricalConfig",
    "Gaussian",
    "GaussianConfig",
    "Likelihood",
    "LikelihoodConfig",
    "LogisticMixture",
    "LogisticMixtureConfig",
    "bits_per_dimension",
    "build_likelihood",
    "dequantised",
]
