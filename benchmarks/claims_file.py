"""docs/claims.yaml: what it may hold.

The file has `runs`, each a command with what it was given and when and where it ran, and under each run its `claims`,
figures in sentences, and `tables`. Beside them `exceptions` name numbers of the pages that are no measurements, with
the reason. `read_claims` checks the file by itself; benchmarks/claims_pages.py holds it against the pages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from benchmarks.claims_scan import table
from common.errors import UserError

SIZES = ("small", "long")
MACHINE = "of the machine"  # a time, or a speed: another machine, or the same one beside other work, has its own
TOLERANCE = re.compile(rf"exactly|{MACHINE}|(within|at least|at most) ([\d.e+-]+)(%?)")
NO_FIGURE = ("", "–", "-")


@dataclass(frozen=True)
class Tolerance:
    """`exactly`, `within 0.3`, `at least 24`, `at most 30`, also with %, of the value; or `of the machine`."""

    text: str

    def allows(self, found: float, value: float) -> bool:
        match = TOLERANCE.fullmatch(self.text)
        assert match is not None  # `read_claims` refuses others
        if match[0] == "exactly":
            return found == value
        if match[0] == MACHINE:
            return found > 0
        limit = float(match[2]) * (abs(value) / 100 if match[3] else 1)
        if match[1] == "within":
            return abs(found - value) <= limit + 1e-9 * max(1.0, abs(value))
        return found >= limit if match[1] == "at least" else found <= limit


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure, or several that are said in one breath."""

    id: str
    says: str
    value: Any  # a number, or a list of them
    unit: str
    tolerance: Tolerance
    where: dict[str, str]  # page: the text that holds the value
    reads: str | None = None  # a regular expression whose groups are the values, in what the command prints
    counts: str | None = None  # or one whose matches there are counted
    proven: bool = False  # the command compares by itself, and ends with an error where the figure does not hold
    scale: float = 1.0  # what is read times this is the value
    count: str | None = None  # of what was measured, where it is not the run's
    bound: Tolerance | None = None  # what we ask of ourselves
    met: bool | None = None

    @property
    def values(self) -> list[float]:
        return [float(value) for value in (self.value if isinstance(self.value, list) else [self.value])]


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A text of another page with figures of a row, rounded as they like, or of claims of the same run."""

    page: str
    row: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A measured table: its values by row and column. A column of a name that occurs twice is called `name#2`."""

    id: str
    says: str
    where: str  # page
    head: str  # how the table's first line begins
    key: list[str]  # columns whose cells name a row
    columns: dict[str, Tolerance]
    rows: dict[str, list[Any]]  # cells of the key, joined by " | ": a number, a list of them, or null for each column
    settings: list[str] = field(default_factory=list)  # columns of numbers that nobody measured
    bounds: dict[str, str] = field(default_factory=dict)  # column: `at least 2.5`, or `at least` and a column of bounds
    missed: list[str] = field(default_factory=list)  # rows that miss a bound
    quotes: list[Quote] = field(default_factory=list)
    count: str | None = None

    def bound_of(self, key: str, column: str) -> Tolerance | None:
        """Of a cell; None where it has none."""
        direction, limit = self.bounds[column][:8].rstrip(), self.bounds[column][8:].lstrip()
        value = self.of(key, limit) if limit in self.columns else limit
        return None if value is None else Tolerance(f"{direction} {value}")

    def of(self, key: str, column: str) -> Any:
        return self.rows[key][list(self.columns).index(column)]

    def misses(self) -> list[tuple[str, str]]:
        """Row and column of each value that misses its bound."""
        cells = [(key, column, self.bound_of(key, column)) for key in self.rows for column in self.bounds]
        return [(key, name) for key, name, bound in cells if bound and not bound.allows(*[self.of(key, name)] * 2)]

    def cells(self, page: str) -> dict[str, dict[str, str]]:
        """Row: column: cell, of this table in a page, or in what a command prints."""
        rows = table(page, self.head)
        if not rows:
            return {}
        head = [name if i == rows[0].index(name) else f"{name}#2" for i, name in enumerate(rows[0])]
        found = [dict(zip(head, row, strict=False)) for row in rows[1:]]
        return {" | ".join(row.get(name, "") for name in self.key): row for row in found}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Commands, one a line, and what the figures they print depend on."""

    id: str
    command: str
    seed: str
    count: str
    commit: str
    date: date
    machine: str
    size: str = "long"
    ci: bool = False
    minutes: float  # on two CPU cores
    checked: date | None = None  # when `make claims` last found it so
    needs: dict[str, str] = field(default_factory=dict)  # link in the working folder: path beside the repository
    peers: list[str] = field(default_factory=list)  # modules that are not among our dependencies
    after: list[str] = field(default_factory=list)  # runs whose results it takes
    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Exempt:
    """Numbers that are no measurements of ours. Without text and table: a whole page."""

    where: str
    reason: str
    texts: list[str] = field(default_factory=list)
    table: str | None = None


@dataclass(frozen=True)
class Claims:
    runs: list[Run]
    exceptions: list[Exempt]


def read_claims(path: Path) -> Claims:
    """Raises UserError for what is not valid, with the place."""
    try:
        # by the library in C where there is one: the other takes seconds
        given = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or set(given) != {"machines", "runs", "exceptions"}:
        raise UserError(f"{path}: expected a mapping with `machines`, `runs` and `exceptions`, and nothing else")
    runs = [built(Run, run, f"runs[{i}]") for i, run in enumerate(given["runs"])]
    found = Claims(runs, [built(Exempt, one, f"exceptions[{i}]") for i, one in enumerate(given["exceptions"])])
    check_values(found, given["machines"])
    return found


def built(kind: Any, given: Any, place: str) -> Any:
    """A dataclass of a mapping, each field of its type."""
    if not isinstance(given, Mapping):
        raise UserError(f"{place} is {given!r}, expected a mapping of fields of a {kind.__name__.lower()}")
    place = f"{place} ({given['id']})" if "id" in given else place
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := set(given) - set(known):
        raise UserError(f"{place} has the field {min(unknown)!r}; the fields are {', '.join(known)}")
    needed = [n for n, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING]
    if lacking := [name for name in needed if name not in given]:
        raise UserError(f"{place} lacks {', '.join(lacking)}")
    hints = get_type_hints(kind)
    return kind(**{name: typed(hints[name], value, f"{place}.{name}") for name, value in given.items()})


def typed(hint: Any, value: Any, place: str) -> Any:
    """A value as its annotation says; raises UserError."""
    text = str(hint)
    if hint is Any or (value is None and "None" in text):
        return value
    if "Tolerance" in text and not text.startswith("dict"):
        if not isinstance(value, str) or not TOLERANCE.fullmatch(value):
            wanted = f"`exactly`, `{MACHINE}`, or `within`, `at least` or `at most` and a number or %"
            raise UserError(f"{place}={value!r}, expected {wanted}")
        return Tolerance(value)
    if text.startswith("dict"):
        inner = hint.__args__[1]
        check_type(isinstance(value, dict), value, place, "a mapping")
        return {str(key): typed(inner, entry, f"{place}[{key!r}]") for key, entry in value.items()}
    if text.startswith("list"):
        check_type(isinstance(value, list), value, place, "a list")
        return [
            built(hint.__args__[0], entry, f"{place}[{i}]") if hint.__args__[0] in (Claim, Quote, Table)
            else typed(hint.__args__[0], entry, f"{place}[{i}]")
            for i, entry in enumerate(value)
        ]  # fmt: skip
    expected = next(kind for kind in (bool, str, date, float) if kind.__name__ in text.replace("datetime.", ""))
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) if expected is float else (
        type(value) is expected
    )  # fmt: skip
    check_type(valid, value, place, {bool: "true or false", str: "a text", date: "a date", float: "a number"}[expected])
    return value


def check_type(valid: bool, value: Any, place: str, expected: str) -> None:
    if not valid:
        raise UserError(f"{place}={value!r}, expected {expected}")


def check_values(claims: Claims, machines: list[str]) -> None:
    """What types do not tell."""
    entries: list[Run | Claim | Table] = []
    for run in claims.runs:
        entries += [run, *run.claims, *run.tables]
    ids = [entry.id for entry in entries]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise UserError(f"the id {twice[0]!r} is there twice; an id names one run, claim or table")
    names = [run.id for run in claims.runs]
    for number, run in enumerate(claims.runs):
        rules = [
            ("size", run.size in SIZES, "small or long"),
            ("ci", not run.ci or run.size == "small", "false where size is long"),
            ("commit", re.fullmatch(r"[0-9a-f]{7,40}", run.commit), "a commit's hexadecimal digits, 7 or more"),
            ("machine", run.machine in machines, f"one of {'; '.join(machines)}"),
            ("after", set(run.after) <= set(names[:number]), "ids of runs above this one"),
            ("claims", run.claims or run.tables, "at least one claim or table"),
        ]
        for name, valid, expected in rules:
            if not valid:
                raise UserError(f"{run.id}.{name}={getattr(run, name)!r}, expected {expected}")
        for claim in run.claims:
            check_claim(run, claim)
        for entry in run.tables:
            check_table(entry)


def check_claim(run: Run, claim: Claim) -> None:
    try:
        values = claim.values
    except (TypeError, ValueError):
        raise UserError(f"{claim.id}.value={claim.value!r}, expected a number or a list of numbers") from None
    if not claim.where:
        raise UserError(f"{claim.id}.where is empty, expected a page and the text that holds the figure")
    if claim.bound is not None:
        met = all(claim.bound.allows(value, value) for value in values)
        if claim.met is not met:
            raise UserError(f"{claim.id}.met={claim.met}, but {claim.value} {'meets' if met else 'misses'} its bound")
    elif claim.met is not None:
        raise UserError(f"{claim.id} has `met` and no `bound`")
    for name, groups in (("reads", len(values)), ("counts", 0)):
        expression = getattr(claim, name)
        try:
            if expression is not None and re.compile(expression).groups not in (groups, 1):
                raise UserError(f"{claim.id}.{name} has other than {groups} groups, those of {claim.value}")
        except re.error as error:
            raise UserError(f"{claim.id}.{name} is no regular expression: {error}") from error
    ways = [claim.reads is not None, claim.counts is not None, claim.proven]
    if run.size == "small" and sum(ways) != 1:
        raise UserError(
            f"{claim.id} of a small run needs one of `reads`, `counts` and `proven`: how its figure is found"
        )


def check_table(entry: Table) -> None:
    names = ", ".join(entry.columns)
    for key, values in entry.rows.items():
        if len(values) != len(entry.columns):
            raise UserError(f"{entry.id}, row {key!r} has {len(values)} values, expected one for each of {names}")
    for column, bound in entry.bounds.items():
        match = re.fullmatch(r"(at least|at most) (.+)", bound)
        if column not in entry.columns or not match or not (match[2] in entry.columns or match[2][0].isdigit()):
            raise UserError(
                f"{entry.id}.bounds[{column!r}]={bound!r}, expected of one of {names}: "
                "`at least` or `at most` and a number, or one of these columns"
            )
    missed = sorted({key for key, _ in entry.misses()})
    if missed != sorted(entry.missed):
        raise UserError(f"{entry.id}.missed={entry.missed}, expected the rows that miss their bounds: {missed}")
