"""A run folder is continued by the command that started it, and by no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError, explain_disk_errors
from common.files import remove_leftovers, write_text

CONFIG_NAME = "config.yaml"

# Fields that may change between restarts: they decide how long, how often and how fast, not what a step learns. (But a
# cosine schedule ends with train.steps, so the learning rate of the steps to come follows it.)
FREE_FIELDS = {
    "train.steps",
    "train.accumulate",
    "train.patience",
    "train.log_every",
    "train.preview_every",
    "train.save_every",
    "train.keep_newest",
    "train.max_nonfinite_steps",
    "train.tracker",
    "train.workers",
    "train.prefetch",
    "data.max_bad_share",
}


def open_run_folder(run: Path) -> None:
    """Makes the run folder where there is none, and clears it of what a kill left half-written."""
    with explain_disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        for folder in (run, run / "checkpoints", run / "previews"):
            remove_leftovers(folder)


def write_config(run: Path, resolved_config: Mapping[str, Any], *, continued: bool) -> None:
    """Writes config.yaml; if the run is `continued`, only after checking that the config is the one it began with.

    Raises UserError that names the fields which differ, `FREE_FIELDS` excepted.
    """
    # As YAML gives it back: tuples as lists, paths as text.
    config = json.loads(json.dumps(resolved_config, default=str))
    path = run / CONFIG_NAME
    if continued and path.is_file():
        try:
            before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: it was damaged or edited; restore it, or start anew") from error
        now = _flat(config)
        differing = [
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name not in FREE_FIELDS and not newly_recorded(name, before)
        ]
        if differing:
            raise UserError(
                f"{run} was started with another config: {'; '.join(differing)}; "
                "give the former values to continue it, or another --run folder to start anew"
            )
    write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def newly_recorded(name: str, before: Mapping[str, Any]) -> bool:
    """Whether a field is the fingerprint of something that the run has always used, and an earlier version did not
    take down."""
    return name.endswith("_fingerprint") and before.get(name) is None


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} as {"train.steps": 3}."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{path}.{key}" if path else str(key)).items()
    }
