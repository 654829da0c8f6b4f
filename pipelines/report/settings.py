"""Settings of runs side by side, and the commands that repeat them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.own_code import names_code
from common.runs import SEQUENCE, TABLE, VAE
from pipelines.folder_kinds import json_of
from pipelines.report.collect import EVALUATION_NAME, Run, Subject
from training.run_folder import flat

COMMANDS = {
    "stage one": "train-stage1",
    VAE: "train-vae",
    TABLE: "train-table",
    SEQUENCE: "train-sequence",
    "stage two": "train-stage2",
}
ABSENT = "–"


class Row(NamedTuple):
    path: str
    values: list[str]
    differs: bool


class SettingsTable(NamedTuple):
    """Of all runs of one stage."""

    stage: str
    names: list[str]  # of the subjects
    numbers: list[int]  # their colours
    differing: list[Row]
    groups: list[tuple[str, list[Row]]]  # by the first part of the path; all rows


def settings_of(subjects: Sequence[Subject]) -> list[SettingsTable]:
    """A table for each stage of which a run has a config."""
    tables = []
    for stage in sorted({run.stage for subject in subjects for run in subject.runs}):
        runs = [(subject, run) for subject in subjects for run in subject.runs if run.stage == stage and run.config]
        if not runs:
            continue
        configs = [flat(run.config) for _, run in runs]
        rows = [row_of(path, configs) for path in dict.fromkeys(path for config in configs for path in config)]
        groups: dict[str, list[Row]] = {}
        for row in rows:
            group = row.path.partition(".")[0] if "." in row.path else "run"
            groups.setdefault(group, []).append(row)
        names, numbers = [subject.name for subject, _ in runs], [subject.number for subject, _ in runs]
        tables.append(SettingsTable(stage, names, numbers, [row for row in rows if row.differs], list(groups.items())))
    return tables


def row_of(path: str, configs: Sequence[dict[str, Any]]) -> Row:
    values = [in_words(config[path]) if path in config else ABSENT for config in configs]
    return Row(path, values, len(set(values)) > 1)


def in_words(value: Any) -> str:
    """As one writes it on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    return str(value)


class CommandLine(NamedTuple):
    what: str
    line: str


def commands_of(subject: Subject, *, seed: int, drawn: int | None, measured: str | None) -> list[CommandLine]:
    """What makes a subject's run and model again, and its samples. drawn: how many samples the page is made of; None:
    there are none. measured: the test images that were given."""
    found = []
    if subject.what == "a run of quickstart":
        found.append(CommandLine("Everything, into a new folder", command("quickstart", run=f"{subject.given}-again")))
    for run in subject.runs:
        found.append(training_command(run))
        if run.stage in ("stage one", VAE) and subject.codes is not None:
            found.append(encode_command(run, subject))
    model = subject.model if subject.is_assembled or any(run.stage == VAE for run in subject.runs) else None
    stages = {run.stage: run.folder for run in subject.runs}
    if {"stage one", "stage two"} <= stages.keys():
        model = model or "model"
        line = command("assemble", stage1=stages["stage one"], stage2=stages["stage two"], out=model)
        found.append(CommandLine("Both stages as one model", line))
    if drawn is not None and model is not None:
        made = command("generate", model=model, num=drawn, seed=seed, out="samples")
        found.append(CommandLine("The samples of this page, at the model's own settings", made))
    judged_model = model or (subject.model if "stage two" not in stages else None)  # a prior alone is not judged
    if measured is not None and judged_model is not None:
        beside = Path(judged_model) if Path(judged_model).is_dir() else Path()  # where the next report finds it
        out = beside / EVALUATION_NAME
        judged = command("evaluate", model=judged_model, **{"data.path": measured}, out=out)
        found.append(CommandLine("Figures with their protocol", judged))
    return found


def training_command(run: Run) -> CommandLine:
    name = COMMANDS.get(run.stage, "train-stage1")
    features = flat(run.config).get("train.evaluate_features")
    own = {"train.evaluate_features": features} if names_code(features) else {}  # a file may not ask for it
    line = command(name, config=run.folder / "config.yaml", run=f"{run.folder}-again", **own)
    return CommandLine(f"The training of {run.stage}, into a new folder", line)


def encode_command(run: Run, subject: Subject) -> CommandLine:
    source = json_of(subject.codes / "index.json").get("source", {}) if subject.codes else {}
    source = source if isinstance(source, dict) else {}
    chosen = {
        name: source[name]
        for name, default in (("augment_copies", 1), ("shard_size", 8192))
        if source.get(name, default) != default
    }
    if source.get("augment_seed"):
        chosen["seed"] = source["augment_seed"]
    return CommandLine("The codes of its images", command("encode", model=run.folder, out=subject.codes, **chosen))


def command(name: str, *words: str, **options: Any) -> str:
    """A command as a shell takes it."""
    given = [f"--{option} {shlex.quote(str(value))}" for option, value in options.items() if value is not None]
    return " ".join(["zellige", name, *map(shlex.quote, words), *given])
