"""What lies in the folders that a report is asked for: runs with their logs, models, code shards, evaluations.

Nothing here loads a model. A run may have been cut at any byte: what can be read of its logs is read, and what cannot
is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import json_value, read_json
from common.model_io import CONFIG_NAME
from common.runs import config_of_run, stage_of_run
from pipelines.folder_kinds import ASSEMBLED, QUICKSTART, SHARDS, json_of, kind_of_folder
from pipelines.model_folders import INDEX_NAME, any_model_folder
from training.metrics_log import METRICS_NAME, TIMING_NAME

EVALUATION_NAME = "evaluation.json"
ACCEPTED = "a run folder, a model, an assembled model or the folder of a quickstart"
LARGEST = 2**63  # whole numbers of a log are below it
UNKNOWN_STAGE = "a stage that its folder does not tell"


@dataclass(frozen=True)
class Run:
    """The folder of a training."""

    folder: Path
    stage: str  # `stage one`, `stage one (VAE)`, `stage two`, or UNKNOWN_STAGE
    config: dict[str, Any]  # of config.yaml; empty where there is none
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl; values may be nan
    timing: list[dict[str, Any]]  # lines of timing.jsonl
    unread: dict[str, int]  # lines that could not be read, by the name of their file

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics), default=0)

    def last(self, name: str, split: str = "validation") -> float | None:
        """The last value of a metric; None where there is none."""
        values = [line[name] for line in self.metrics if line["split"] == split and is_number(line.get(name))]
        return values[-1] if values else None


@dataclass
class Subject:
    """One of the folders that a report is about."""

    given: str  # as it was named
    name: str  # short, and unlike those of the others
    what: str  # such as `a run of stage one`
    runs: tuple[Run, ...] = ()
    model: str | None = None  # folder or hub id that holds its model or models; None where there is none yet
    codes: Path | None = None  # code shards that lie with it
    evaluation: dict[str, Any] | None = None  # of evaluation.json
    given_parts: tuple[str, ...] = ()  # parts of it that were named beside it
    number: int = 0  # among the subjects of a report: its colour
    notes: list[str] = field(default_factory=list)  # what a person should know before anything else

    @property
    def is_assembled(self) -> bool:
        """Whether its folder holds all that draws images."""
        return self.what.startswith((ASSEMBLED, QUICKSTART))


def subjects_of(given: Sequence[str]) -> list[Subject]:
    """What is given, one subject each. Raises UserError for what is neither a run nor a model, and where one is named
    twice."""
    for position, path in enumerate(given):
        if Path(path).resolve() in [Path(other).resolve() for other in given[:position]]:
            raise UserError(f"{path} is given twice, expected different runs or models; leave it out once")
    subjects = [subject_of(path) for path in given]
    for number, (subject, name) in enumerate(zip(subjects, short_names(given), strict=True)):
        subject.number, subject.name = number, name
    return subjects


def subject_of(given: str) -> Subject:
    """Raises UserError for what is neither a run nor a model."""
    folder = Path(given)
    if folder.is_file():
        raise UserError(f"{given} is a file, expected {ACCEPTED}")
    if folder.name == "model" and is_run(folder.parent):  # a run's model stands for the run
        folder = folder.parent
    kind = kind_of_folder(folder) if folder.is_dir() else None
    if kind is not None and kind.what == QUICKSTART:
        runs = tuple(read_run(folder / part) for part in ("stage1", "stage2") if is_run(folder / part))
        codes = folder / "codes" if (folder / "codes" / "index.json").is_file() else None
        subject = Subject(given, given, kind.what, runs, str(folder / "model"), codes)
    elif is_run(folder):
        run = read_run(folder)
        trained = folder / "model"
        model = str(folder) if (trained / CONFIG_NAME).is_file() else None
        subject = Subject(given, given, f"a run of {run.stage}", (run,), model, codes_of(run))
        if model is None:
            subject.notes.append("the run has no model yet: it was stopped before its first checkpoint")
    elif kind is not None and kind.what.startswith(("a model", "an assembled")):
        subject = Subject(given, given, kind.what, model=given)
    elif folder.is_dir() or kind is not None:
        what = f"{given} is {kind.what}" if kind else f"{given} holds neither a run nor a model"
        raise UserError(f"{what}, expected {ACCEPTED}")
    else:  # a hub id, or nothing
        index = any_model_folder(given) / INDEX_NAME
        subject = Subject(given, given, ASSEMBLED if index.is_file() else "a model", model=given)
    subject.evaluation = evaluation_of(folder, subject)
    for run in subject.runs:
        for name, count in run.unread.items():
            subject.notes.append(f"{count} of the lines of {run.folder / name} cannot be read and are left out")
    return subject


def is_run(folder: Path) -> bool:
    """Whether a training was begun there, however little it has written."""
    return stage_of_run(folder) is not None or (folder / METRICS_NAME).is_file()


def read_run(folder: Path) -> Run:
    metrics, bad_metrics = read_lines(folder / METRICS_NAME, {"step": int, "split": str})
    timing, bad_timing = read_lines(folder / TIMING_NAME, {"step": int})
    unread = {name: count for name, count in ((METRICS_NAME, bad_metrics), (TIMING_NAME, bad_timing)) if count}
    return Run(folder, stage_of_run(folder) or UNKNOWN_STAGE, config_of_run(folder), metrics, timing, unread)


def read_lines(path: Path, needed: dict[str, type]) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file, one on each line, that have these fields; and how many lines are none of them: of a
    file that was cut or damaged. Nothing where there is no file."""
    if not path.is_file():
        return [], 0
    found, unread = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            value = json_value(line)
        except ValueError:
            value = None
        if is_line(value, needed):
            found.append(value)
        else:
            unread += 1
    return found, unread


def is_line(value: Any, needed: dict[str, type]) -> bool:
    fields = isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in needed.items())
    return fields and 0 <= value.get("step", 0) < LARGEST


def is_number(value: Any) -> bool:
    """Whether a value of a log is a number, nan and infinity included."""
    return isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)


def codes_of(run: Run) -> Path | None:
    """The code shards that a run of stage two learned, where they lie where it found them."""
    path = run.config.get("codes")
    if run.stage != "stage two" or not isinstance(path, str):
        return None
    kind = kind_of_folder(Path(path)) if Path(path).is_dir() else None
    return Path(path) if kind is not None and kind.what == SHARDS else None


def evaluation_of(folder: Path, subject: Subject) -> dict[str, Any] | None:
    """What `zellige evaluate` left in the folder, or beside its model."""
    places = [folder, folder / "model", *(run.folder for run in subject.runs)]
    for place in places:
        if (place / EVALUATION_NAME).is_file():
            try:
                return read_json(place / EVALUATION_NAME)
            except UserError as error:
                subject.notes.append(str(error))
    return None


def short_names(given: Sequence[str]) -> list[str]:
    """The ends of paths, each as long as tells it from the others."""
    parts = [Path(path).parts for path in given]

    def end(position: int, length: int) -> str:
        return "/".join(parts[position][-length:])

    names = []
    for position in range(len(given)):
        length = 1
        while length < len(parts[position]) and any(
            end(other, length) == end(position, length) for other in range(len(given)) if other != position
        ):
            length += 1
        names.append(end(position, length))
    return names


def kind_of_model(folder: Path) -> str | None:
    """The `kind` in a model folder's config."""
    kind = json_of(folder / CONFIG_NAME).get("kind")
    return kind if isinstance(kind, str) else None
