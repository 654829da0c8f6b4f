"""Priors over latents that a VAE trains with, by the `kind` of their config."""

from __future__ import annotations

from typing import Any

from stage1_vae.priors.base import LatentPrior
from stage1_vae.priors.standard_normal import StandardNormal, StandardNormalConfig

LatentPriorConfig = StandardNormalConfig

PRIORS: dict[str, Any] = {  # classes of LatentPrior, each with a config class of its own
    "standard_normal": (StandardNormal, StandardNormalConfig),
}

__all__ = ["PRIORS", "LatentPrior", "LatentPriorConfig", "StandardNormal", "StandardNormalConfig"]
