"""Objectives, what a VAE is trained by, by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.objectives.adversarial import AdversarialAutoencoder, AdversarialAutoencoderConfig
from stage1_vae.objectives.aggressive import Aggressive, AggressiveConfig
from stage1_vae.objectives.balanced import Balanced, BalancedConfig
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.elbo import ELBO, ELBOConfig
from stage1_vae.objectives.hamiltonian import Hamiltonian, HamiltonianConfig
from stage1_vae.objectives.importance import ImportanceConfig, ImportanceWeighted
from stage1_vae.objectives.information import AutoencoderConfig, DeterministicAutoencoder, InfoVAE, InfoVAEConfig
from stage1_vae.objectives.multimodal import MixtureBound, MixtureBoundConfig, Subsampled, SubsampledConfig
from stage1_vae.objectives.semi_supervised import SemiSupervised, SemiSupervisedConfig
from stage1_vae.objectives.total_correlation import BetaTC, BetaTCConfig, Factor, FactorConfig

ObjectiveConfig = (
    (
        ELBOConfig
        | ImportanceConfig
        | InfoVAEConfig
        | AutoencoderConfig
        | AdversarialAutoencoderConfig
        | BetaTCConfig
        | FactorConfig
    )
    | BalancedConfig
    | HamiltonianConfig
    | AggressiveConfig
    | SubsampledConfig
    | MixtureBoundConfig
    | SemiSupervisedConfig
)

OBJECTIVES: dict[str, Any] = {  # classes of Objective, each with a config class of its own
    "elbo": (ELBO, ELBOConfig),
    "balanced": (Balanced, BalancedConfig),
    "importance": (ImportanceWeighted, ImportanceConfig),
    "info": (InfoVAE, InfoVAEConfig),
    "autoencoder": (DeterministicAutoencoder, AutoencoderConfig),
    "adversarial": (AdversarialAutoencoder, AdversarialAutoencoderConfig),
    "beta_tc": (BetaTC, BetaTCConfig),
    "factor": (Factor, FactorConfig),
    "hamiltonian": (Hamiltonian, HamiltonianConfig),
    "aggressive": (Aggressive, AggressiveConfig),
    "subsampled": (Subsampled, SubsampledConfig),
    "mixture_bound": (MixtureBound, MixtureBoundConfig),
    "semi_supervised": (SemiSupervised, SemiSupervisedConfig),
}


def build_objective(config: ObjectiveConfig, facts: TrainingFacts) -> Objective:
    return OBJECTIVES[config.kind][0](config, facts)


__all__ = [
    "ELBO",
    "OBJECTIVES",
    "AdversarialAutoencoder",
    "AdversarialAutoencoderConfig",
    "Aggressive",
    "AggressiveConfig",
    "AutoencoderConfig",
    "Balanced",
    "BalancedConfig",
    "BetaTC",
    "BetaTCConfig",
    "DeterministicAutoencoder",
    "ELBOConfig",
    "Factor",
    "FactorConfig",
    "Hamiltonian",
    "HamiltonianConfig",
    "ImportanceConfig",
    "ImportanceWeighted",
    "InfoVAE",
    "InfoVAEConfig",
    "MixtureBound",
    "MixtureBoundConfig",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "SemiSupervised",
    "SemiSupervisedConfig",
    "Subsampled",
    "SubsampledConfig",
    "TrainingFacts",
    "build_objective",
]
