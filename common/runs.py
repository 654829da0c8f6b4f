"""What the folder of a training says of itself: that it is one, and of which stage."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import read_json
from common.safe_yaml import load_yaml

RUN_CONFIG_NAME = "config.yaml"  # what the run is: itself a recipe
FACTS_NAME = "run.json"  # of which stage it is, and fingerprints of its data; earlier versions wrote none

VAE = "stage one (VAE)"
TABLE = "stage one (table)"
SEQUENCE = "stage one (sequence)"

# Fields that only recipes of one stage have; those of a table or of sequences have an objective besides, as those of a
# VAE do, and those of a VAE data, as those of stage one do: the first of several counts.
FIELDS_OF = {
    TABLE: {"table"},
    SEQUENCE: {"sequences"},
    VAE: {"objective"},
    "stage one": {"data", "perceptual", "adversarial"},
    "stage two": {"codes", "label_dropout", "num_classes", "level", "given", "captions", "draws", "latents"},
}


def config_of_run(run: Path) -> dict[str, Any]:
    """Of `config.yaml`; empty where there is none, or none that can be read."""
    with suppress(OSError, ValueError, yaml.YAMLError):  # ValueError: no UTF-8, or a date that there is not
        config = load_yaml((run / RUN_CONFIG_NAME).read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    return {}


def is_config_of_run(config: dict[str, Any]) -> bool:
    """Whether it is of a training of ours, as one that was stopped before its first checkpoint leaves it: others call
    their files config.yaml too."""
    return isinstance(config.get("train"), dict) and "save_every" in config["train"]


def stage_of_run(run: Path) -> str | None:
    """The stage whose training a folder holds, one of `FIELDS_OF`; None where it holds none of a stage."""
    with suppress(UserError, OSError, KeyError, TypeError):
        stage = read_json(run / FACTS_NAME)["stage"]
        if stage in FIELDS_OF:
            return str(stage)
    return stage_of_recipe(config_of_run(run))


def stage_of_recipe(recipe: Any) -> str | None:
    """The stage whose fields a recipe or a run's config has; None where they do not tell."""
    if not isinstance(recipe, dict):
        return None
    stages = [stage for stage, names in FIELDS_OF.items() if recipe.keys() & names]
    return stages[0] if len(stages) == 1 or stages in ([TABLE, VAE], [SEQUENCE, VAE], [VAE, "stage one"]) else None
