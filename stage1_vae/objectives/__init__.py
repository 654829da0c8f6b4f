"""Objectives, what a VAE is trained by, by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import ELBO, ELBOConfig

ObjectiveConfig = ELBOConfig

OBJECTIVES: dict[str, Any] = {  # classes of Objective, each with a config class of its own
    "elbo": (ELBO, ELBOConfig),
}


def build_objective(config: ObjectiveConfig, facts: TrainingFacts) -> Objective:
    return OBJECTIVES[config.kind][0](config, facts)


__all__ = [
    "ELBO",
    "OBJECTIVES",
    "ELBOConfig",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "TrainingFacts",
    "build_objective",
]
