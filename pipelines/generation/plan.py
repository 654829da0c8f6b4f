"""What each sample is: its class, its text, its seed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.files import json_value, sha256_of_file
from common.wording import either
from pipelines.labels import class_named
from pipelines.prior_requests import KnowsClasses, labels_of

NUM = 64  # images, when nothing else is said
COLUMNS = ("label", "prompt", "seed", "count")


@dataclass(frozen=True)
class Amount:
    """How many samples are asked for, one way or another. Raises UserError for two ways at once."""

    num: int | None = None
    per_class: int | None = None  # of each class
    plan: str | None = None  # file

    def __post_init__(self) -> None:
        for name in ("num", "per_class"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}, expected at least 1 image")
        if self.per_class is not None and not (self.num is None and self.plan is None):
            raise UserError("got per_class with num or a plan, expected it alone: it says how many of each class")

    def rows(self, class_names: Sequence[str] | None) -> PlanFile | None:
        """Of the plan, if there is one. Raises UserError."""
        return None if self.plan is None else read_plan(self.plan, class_names)

    def number(self, rows: PlanFile | None, num_classes: int) -> int:
        """num_classes: that the model knows. Raises UserError."""
        if self.per_class is not None:
            if num_classes == 0:
                raise UserError(f"per_class={self.per_class}, but this model has no classes; give num")
            return self.per_class * num_classes
        if rows is None:
            return NUM if self.num is None else self.num
        if self.num is not None and self.num > rows.num:
            raise UserError(f"num={self.num}, but plan={self.plan} says {rows.num} images; expected at most as many")
        return self.num or rows.num


class Asked(NamedTuple):
    """What a batch is to be."""

    numbers: Sequence[int]  # of the samples of their seeds
    seeds: int | list[int]
    labels: list[int] | None
    prompts: list[str] | None


class Plan(NamedTuple):
    """What `num` samples are to be: sample i a function of i."""

    num: int
    seed: int
    labels: Callable[[Sequence[int]], list[int] | None]  # of samples, by number
    prompts: Callable[[Sequence[int]], list[str] | None] = lambda samples: None
    rows: PlanFile | None = None  # says the seeds, where it has some
    class_names: Sequence[str] | None = None
    with_prompts: bool = False  # whether the record of each image tells its text: it is not that of all
    more: Callable[[int], dict[str, Any]] = lambda sample: {}  # else that the record tells of a sample, by number

    def check(self, model: KnowsClasses) -> None:
        """Raises UserError for classes and prompts that the model does not know: looks at each class once, and at one
        sample, not at all of a million."""
        if self.rows is not None and self.rows.labels is not None:
            known = np.unique(self.rows.labels).tolist()
            labels_of(model, known, known)
        self.of(range(1))

    def of(self, samples: Sequence[int]) -> Asked:
        """Samples beyond `num`, which fill up a batch and are dropped, are as the first ones of a plan file."""
        if self.rows is None:
            return Asked(samples, self.seed, self.labels(samples), self.prompts(samples))
        within = [i % self.rows.num for i in samples]
        numbers, seeds = self.rows.draws(samples, within, self.seed)
        return Asked(numbers, seeds, self.labels(within), self.prompts(within))

    def lines(self, unit: range) -> Iterator[dict[str, Any]]:
        """What the record of images tells of each of a unit, besides its file."""
        asked = self.of(unit)
        for place, i in enumerate(unit):
            line: dict[str, Any] = {"index": i, "label": None if asked.labels is None else asked.labels[place]}
            if self.class_names and asked.labels is not None and asked.labels[place] < len(self.class_names):
                line["class_name"] = self.class_names[asked.labels[place]]
            if self.with_prompts and asked.prompts is not None:
                line["prompt"] = asked.prompts[place]
            if not isinstance(asked.seeds, int):
                line |= {"seed": asked.seeds[place], "index_of_seed": asked.numbers[place]}
            yield line | self.more(i)


class PlanFile(NamedTuple):
    """Rows of a plan, in a few bytes each besides their texts."""

    sha256: str
    ends: np.ndarray  # rows, int64: how many samples there are up to the end of a row
    labels: np.ndarray | None  # rows, int64
    texts: list[str] | None  # of rows
    seeds: np.ndarray | None  # rows, uint64
    seeded: np.ndarray | None  # rows, bool: whether it has a seed of its own

    @property
    def num(self) -> int:
        return int(self.ends[-1])

    def rows_of(self, samples: Sequence[int]) -> list[int]:
        return np.searchsorted(self.ends, np.asarray(samples), side="right").tolist()

    def labels_of(self, samples: Sequence[int]) -> list[int] | None:
        return None if self.labels is None else self.labels[self.rows_of(samples)].tolist()

    def prompts_of(self, samples: Sequence[int]) -> list[str] | None:
        return None if self.texts is None else [self.texts[row] for row in self.rows_of(samples)]

    def draws(self, samples: Sequence[int], within: Sequence[int], seed: int) -> tuple[Sequence[int], int | list[int]]:
        """Which sample of which seed each is: sample i of `seed`, or, of a row with a seed of its own, its first sample
        is number 0 of that seed. within: the samples by their place in the plan."""
        if self.seeds is None or self.seeded is None:
            return samples, seed
        numbers, seeds = [], []
        for i, row, place in zip(samples, self.rows_of(within), within, strict=True):
            own = bool(self.seeded[row])
            numbers.append(place - (int(self.ends[row - 1]) if row else 0) if own else i)
            seeds.append(int(self.seeds[row]) if own else seed)
        return numbers, seeds


def read_plan(path: str, class_names: Sequence[str] | None) -> PlanFile:
    """A CSV file with a head, or one JSON object a line, with some of the columns label (number or name), prompt, seed
    and count (1 where it is left out). Raises UserError."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"plan={path}: there is no such file; expected a .csv or a .jsonl file")
    counts: list[int] = []
    labels: list[int] = []
    texts: list[str] = []
    seeds: list[int] = []
    seeded: list[bool] = []
    same: dict[str, str] = {}  # equal texts are kept once
    columns: set[str] | None = None
    for line, row in rows_of_file(place, path):
        where = f"plan={path}, line {line}"
        found = {name for name, value in row.items() if value not in (None, "")}
        if unknown := [name for name in row if name not in COLUMNS]:
            raise UserError(f"{where}: {unknown[0]!r} is no column of a plan; expected {either(COLUMNS)}")
        columns = found & {"label", "prompt"} if columns is None else columns
        if columns != found & {"label", "prompt"}:
            differing = sorted(columns ^ (found & {"label", "prompt"}))[0]
            raise UserError(f"{where}: some rows have a {differing} and others have none; give all rows one, or none")
        if "label" in found:
            labels.append(label_in(row["label"], class_names, where))
        if "prompt" in found:
            if not isinstance(row["prompt"], str):
                raise UserError(f"{where}: prompt={row['prompt']!r}, expected a text")
            texts.append(same.setdefault(row["prompt"], row["prompt"]))
        counts.append(number_in(row.get("count"), "count", where, 1, 1, 2**40))
        seeds.append(number_in(row.get("seed"), "seed", where, 0, 0, 2**64 - 1))
        seeded.append("seed" in found)
    if not counts:
        raise UserError(f"plan={path} has no row; expected one for each image, or for `count` of them")
    return PlanFile(
        sha256_of_file(place),
        np.cumsum(np.array(counts, dtype=np.int64)),
        np.array(labels, dtype=np.int64) if labels else None,
        texts or None,
        np.array(seeds, dtype=np.uint64) if any(seeded) else None,
        np.array(seeded) if any(seeded) else None,
    )


def rows_of_file(place: Path, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the number of its line. Raises UserError."""
    if place.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"plan={path}, expected a .csv or a .jsonl file")
    try:
        with open(place, encoding="utf-8-sig", newline="") as file:
            if place.suffix.lower() == ".csv":
                reader = csv.DictReader(file, restkey="more than the head", strict=True)
                head = reader.fieldnames or []
                if twice := [name for name in head if head.count(name) > 1]:
                    raise UserError(f"plan={path} has two columns {twice[0]!r}, expected each once")
                for row in reader:
                    yield reader.line_num, row
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    row = json_value(text)
                    if not isinstance(row, dict):
                        raise UserError(f'plan={path}, line {line}: expected an object such as {{"label": 3}}')
                    yield line, row
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"plan={path} cannot be read ({error}); expected UTF-8, a CSV or one JSON object a line"
        ) from error


def label_in(value: Any, class_names: Sequence[str] | None, where: str) -> int:
    """The class of this name, or of this number. Whether the model has it is asked when it is drawn."""
    if isinstance(value, bool | float | list | dict):
        raise UserError(f"{where}: label={value!r}, expected a class by number or name")
    if str(value) in (class_names or ()):
        return class_named(class_names, str(value))
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is not None and abs(number) < 2**63:
        return number
    try:
        return class_named(class_names, str(value))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def number_in(value: Any, name: str, where: str, default: int, least: int, most: int) -> int:
    if value in (None, ""):
        return default
    try:
        number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else least - 1
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise UserError(f"{where}: {name}={value!r}, expected a whole number from {least} to {most}")
    return number
