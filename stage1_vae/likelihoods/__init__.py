"""Likelihoods by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.likelihoods.base import Likelihood
from stage1_vae.likelihoods.bernoulli import Bernoulli, BernoulliConfig

LikelihoodConfig = BernoulliConfig

LIKELIHOODS: dict[str, Any] = {  # classes of Likelihood, each with a config class of its own
    "bernoulli": (Bernoulli, BernoulliConfig),
}


def build_likelihood(config: LikelihoodConfig, channels: int) -> Likelihood:
    return LIKELIHOODS[config.kind][0](config, channels)


__all__ = ["LIKELIHOODS", "Bernoulli", "BernoulliConfig", "Likelihood", "LikelihoodConfig", "build_likelihood"]
