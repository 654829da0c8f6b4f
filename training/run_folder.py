"""A run folder is continued by the command that started it, and by no other.

`config.yaml` says what the run is, and is itself a recipe; `run.json` says of which stage it is, and has a fingerprint
of whatever the config names by its path: images, codes, captions. A run may then be continued with its data elsewhere,
and is not with other data in the same place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError, explain_disk_errors
from common.files import read_json, remove_leftovers, write_json, write_text
from common.folder_lock import held
from common.owned_folder import TRAINING, check_owner
from common.runs import FACTS_NAME, RUN_CONFIG_NAME, stage_of_run
from common.safe_yaml import load_yaml

# Fields that may change between restarts: they decide how long, how often and how fast, not what a step learns. Three
# of them change the result all the same: a cosine schedule ends with train.steps, so the learning rates to come follow
# it; train.validate_every decides which weights there are to choose the best from, and when a guard looks on; and what
# train.compile and train.channels_last compute differs in its last bits.
FREE_FIELDS = {
    "train.steps",
    "train.accumulate",
    "train.compile",
    "train.channels_last",
    "train.checkpoint_activations",
    "train.patience",
    "train.log_every",
    "train.validate_every",
    "train.evaluate_every",
    "train.evaluate_images",
    "train.evaluate_features",
    "train.evaluate_weights",
    "train.preview_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep_newest",
    "train.keep_every",
    "train.timeout_minutes",
    "train.save_in_background",
    "train.max_nonfinite_steps",
    "train.tracker",
    "train.workers",
    "train.prefetch",
    "data.max_bad_share",
    "data.max_pixels",
    "data.relist",
    "data.download_folder",  # what is in it is compared
    "model.backbone_pretrained",  # where the weights began is of no account once they have moved on
    "decoder",
}
# Of any part: leave to fetch a file, when to warn, and how code vectors were before the first step.
FREE_NAMES = {"download", "warn_usage_below", "init"}


def nothing_to_say() -> str:
    return ""


def nothing_named() -> dict[str, str]:
    return {}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run is, beside its config."""

    stage: str = ""  # such as `stage one`
    samples: str = "images"  # what a person calls the training samples
    defaults: Mapping[str, Any] | None = None  # of the fields of the config, by path, as `defaults_of` gives them
    # Fingerprints of what fields of the config name, by the path of the field. Called on the main process only.
    data: Callable[[], dict[str, str]] = nothing_named
    notes: tuple[str, ...] = ()  # what a person should know before the first step
    # Called on the main process when the folder is this run's, before anything is read; its line, if any, is said.
    opened: Callable[[], str] = nothing_to_say


@contextmanager
def held_run(run: Path) -> Iterator[None]:
    """Inside, the run folder is this job's alone. Raises UserError if another trains there, and for a folder of
    anything but a run: hidden files, logs and notes may be in it."""
    check_owner(run, TRAINING, "--run")
    with held(run, TRAINING):
        yield


def has_begun(run: Path) -> bool:
    """Whether there is a checkpoint to continue from: what a new run begins with is of no account then."""
    return any((run / "checkpoints").glob("step_*"))


def open_run_folder(run: Path) -> None:
    """Makes the run folder where there is none, and clears it of what a kill left half-written."""
    with explain_disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        for folder in (run, run / "checkpoints", run / "previews"):
            remove_leftovers(folder)


def check_stage(run: Path, stage: str) -> None:
    """Raises UserError for a folder with a run of another stage."""
    found = stage_of_run(run)
    if found not in (None, stage):
        raise UserError(f"{run} is a run of {found}, and this is {stage}: name another folder by --run")


def write_config(
    run: Path, resolved_config: Mapping[str, Any], facts: RunFacts | None = None, *, continued: bool
) -> None:
    """Writes config.yaml and run.json; if the run is `continued`, only after checking that it began with the same.

    A field that config.yaml does not know, because a later version added it, had its default. Raises UserError that
    names the fields which differ, `FREE_FIELDS` excepted.
    """
    facts = facts or RunFacts()
    config, data = plain(resolved_config), facts.data()
    path, facts_path = run / RUN_CONFIG_NAME, run / FACTS_NAME
    if continued and path.is_file():
        try:
            before = flat(load_yaml(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError) as error:  # no UTF-8, or a date that there is not
            raise UserError(f"{path} is not valid YAML: it was damaged or edited; restore it, or start anew") from error
        known = read_json(facts_path).get("data", {}) if facts_path.is_file() else {}
        compared = {name for name in data if name in known}
        defaults, now = plain(facts.defaults or {}), flat(config)
        moved = [name for name in data if name not in known and before.get(name) != now.get(name)]
        other = [name for name in sorted(compared) if known[name] != data[name]]
        differing = differences({**defaults, **before}, {**defaults, **now}, compared)
        differing += [f"{name}={now.get(name)!r} holds something else than when the run began" for name in other]
        if differing:
            remedies = [f"give the former values to continue it, which --config {path} has"]
            if moved:
                remedies.append(
                    f"if the same lies in another place now, which was not recorded when the run began, write the new "
                    f"{' and '.join(moved)} into {path}"
                )
            if other:
                remedies.append(f"delete {facts_path} to go on with other data")
            raise UserError(
                f"{run} was started with another config: {'; '.join(differing)}; {', or '.join(remedies)}, "
                "or name another --run folder to start anew"
            )
    write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(facts_path, {"stage": facts.stage, "data": data})


def newly_recorded(name: str, before: Mapping[str, Any]) -> bool:
    """Whether a field is the fingerprint of something that the run has always used, and an earlier version did not
    take down."""
    return name.endswith("_fingerprint") and before.get(name) is None


def differences(before: Mapping[str, Any], now: Mapping[str, Any], compared: Iterable[str]) -> list[str]:
    """A phrase on each field that differs, but for free ones and those whose content is `compared` elsewhere."""
    apart = {*FREE_FIELDS, *compared}
    return [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in apart and name.rpartition(".")[2] not in FREE_NAMES
        if not newly_recorded(name, before)
    ]


def defaults_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """The default of each field of a config, and of the configs inside it, by path; without those that have none.

    Of a config inside it they are those of its class: that is what a field which a later version adds was before.
    """
    found: dict[str, Any] = {}
    for field in fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        default: Any = field.default if field.default_factory is MISSING else field.default_factory()
        if is_dataclass(value):
            found |= defaults_of(value, f"{path}.")
            if hasattr(default, "kind"):
                found[f"{path}.kind"] = default.kind
        elif default is not MISSING:
            found[path] = default
    return found


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As YAML gives it back: tuples as lists, paths as text."""
    return json.loads(json.dumps(values, default=str))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} as {"train.steps": 3}."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in flat(inner, f"{path}.{key}" if path else str(key)).items()
    }
