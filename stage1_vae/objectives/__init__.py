"""Objectives, what a VAE is trained by, by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import ELBO, ELBOConfig
from stage1_vae.objectives.importance import ImportanceConfig, ImportanceWeighted
from stage1_vae.objectives.information import AutoencoderConfig, DeterministicAutoencoder, InfoVAE, InfoVAEConfig

ObjectiveConfig = ELBOConfig | ImportanceConfig | InfoVAEConfig | AutoencoderConfig

OBJECTIVES: dict[str, Any] = {  # classes of Objective, each with a config class of its own
    "elbo": (ELBO, ELBOConfig),
    "importance": (ImportanceWeighted, ImportanceConfig),
    "info": (InfoVAE, InfoVAEConfig),
    "autoencoder": (DeterministicAutoencoder, AutoencoderConfig),
}


def build_objective(config: ObjectiveConfig, facts: TrainingFacts) -> Objective:
    return OBJECTIVES[config.kind][0](config, facts)


__all__ = [
    "ELBO",
    "OBJECTIVES",
    "AutoencoderConfig",
    "DeterministicAutoencoder",
    "ELBOConfig",
    "ImportanceConfig",
    "ImportanceWeighted",
    "InfoVAE",
    "InfoVAEConfig",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "TrainingFacts",
    "build_objective",
]
