"""Defaults of models never change: a fingerprint leaves out what is a default, so that it survives new fields. A model
made with another default would have another fingerprint, and its priors, codes and .zlg files would not know it."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.quantizers import QUANTIZERS
from stage2_prior.priors import PRIORS

FROZEN = Path(__file__).with_name("defaults.json")


def default_of(field: Field[Any]) -> Any:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return "no default"
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value))


def defaults() -> dict[str, dict[str, Any]]:
    classes = [model.config_class for model in (*AUTOENCODERS.values(), *QUANTIZERS.values(), *PRIORS.values())]
    return {one.__name__: {field.name: default_of(field) for field in fields(one)} for one in classes}


def test_defaults_of_models_are_those_they_were_made_with():
    """A new field or model is added to defaults.json, by `python -m tests.test_defaults`; no other line may change."""
    assert json.loads(FROZEN.read_text()) == defaults()


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(defaults(), indent=1) + "\n")
