"""Defaults of models never change: a fingerprint leaves out what is a default, so that it survives new fields. A model
made with another default would have another fingerprint, and its priors, codes and .zlg files would not know it."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from stage1_vae.decoders import InterleavedConfig, PixelCNNDecoderConfig
from stage1_vae.likelihoods import LIKELIHOODS
from stage1_vae.models import MODELS
from stage1_vae.networks import NETWORKS
from stage1_vae.networks.spatial import SpatialConfig
from stage1_vae.posteriors import POSTERIORS
from stage1_vae.priors import PRIORS as PRIORS_OF_VAES
from stage1_vae.tables.masks import MASKS
from stage1_vae.tables.models import MODELS as TABLE_MODELS
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.quantizers import QUANTIZERS
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.priors import PRIORS

FROZEN = Path(__file__).with_name("defaults.json")


def default_of(field: Field[Any]) -> Any:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return "no default"
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value))


def defaults() -> dict[str, dict[str, Any]]:
    models = (*AUTOENCODERS.values(), *QUANTIZERS.values(), *PRIORS.values(), *LATENT_PRIORS.values())
    classes = [model.config_class for model in models]
    for kinds in (POSTERIORS, PRIORS_OF_VAES, LIKELIHOODS, NETWORKS, MODELS, MASKS, TABLE_MODELS):
        classes += [kind[-1] for kind in kinds.values()]
    classes += [InterleavedConfig, PixelCNNDecoderConfig, SpatialConfig]
    return {one.__name__: {field.name: default_of(field) for field in fields(one)} for one in classes}


def test_defaults_of_models_are_those_they_were_made_with():
    """A new field or model is added to defaults.json, by `python -m tests.test_defaults`; no other line may change."""
    assert json.loads(FROZEN.read_text()) == defaults()


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(defaults(), indent=1) + "\n")
