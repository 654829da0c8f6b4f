"""docs/claims.yaml: what it may hold, and that README and docs say what it says.

The file has `runs`, each a command with what it was given and when and where it ran, and under each run its `claims`,
figures in sentences, and `tables`. Beside them `exceptions` name numbers of the pages that are no measurements, with
the reason. `read_claims` checks the file by itself, `check_pages` holds it against the pages, both ways: what is
claimed stands there, and what stands there is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from benchmarks.claims_scan import BARE, Place, numbers, pages, places, single, table, written
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
    ids = [entry.id for run in claims.runs for entry in (run, *run.claims, *run.tables)]
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


# ---- held against the pages ------------------------------------------------------------------------------------------


def check_pages(claims: Claims, root: Path) -> list[str]:
    """What is wrong between the claims and README and docs: claims that no page holds, figures that nobody claims."""
    texts = pages(root)
    found = {name: list(places(page)) for name, page in texts.items()}
    problems: list[str] = []
    covered: dict[str, list[str]] = {name: [] for name in found}  # texts that claims hold
    tables: dict[str, list[str]] = {name: [] for name in found}  # heads of tables that are claimed or excepted
    whole: set[str] = set()

    def page_of(name: str, what: str) -> list[Place]:
        if name not in found:
            problems.append(f"{what}: there is no page {name}")
        return found.get(name, [])

    for run in claims.runs:
        for claim in run.claims:
            for name, held in claim.where.items():
                problems += text_problems(claim.id, held, name, page_of(name, claim.id))
                problems += value_problems(claim, held)
                covered.setdefault(name, []).append(single(held))
        for entry in run.tables:
            page_of(entry.where, entry.id)
            others = {key for run in claims.runs for one in run.tables if one.head == entry.head for key in one.rows}
            problems += table_problems(entry, texts.get(entry.where, ""), others)
            tables.setdefault(entry.where, []).append(single(entry.head))
            for quote in entry.quotes:
                problems += text_problems(entry.id, quote.text, quote.page, page_of(quote.page, entry.id))
                problems += quote_problems(run, entry, quote)
                covered.setdefault(quote.page, []).append(single(quote.text))
    for one in claims.exceptions:
        held = page_of(one.where, "exceptions")
        for text in one.texts:
            problems += text_problems("exceptions", text, one.where, held)
            covered.setdefault(one.where, []).append(single(text))
        if one.table is not None:
            if not any((place.head or "").startswith(single(one.table)) for place in held):
                problems.append(f"exceptions: {one.where} has no table that begins {one.table!r}")
            tables.setdefault(one.where, []).append(single(one.table))
        if not one.texts and one.table is None:
            whole.add(one.where)
    for name, held in found.items():
        if name in whole:
            continue
        for place in held:
            if place.head is not None and place.head.startswith(tuple(tables[name])):
                continue
            problems += unclaimed(name, place, covered[name])
    return problems


def text_problems(what: str, text: str, name: str, held: list[Place]) -> list[str]:
    times = sum(place.text.count(single(text)) for place in held)
    if times == 1 or not held:
        return []
    return [f"{what}: {name} says {text!r} {'nowhere' if not times else f'{times} times, expected once'}"]


def value_problems(claim: Claim, text: str) -> list[str]:
    """The values in the text, and no figure that is not among them."""
    place = Place(0, single(text), "" if "|" in text else None)
    there = numbers(place.text)
    lacking = [value for value in claim.values if value not in there]
    if lacking:
        return [f"{claim.id}: the value {lacking[0]:g} is not in its text {text!r}"]
    more = [n for begin, end in place.figures() for n in numbers(place.text[begin:end]) if n not in claim.values]
    return [f"{claim.id}: {more[0]:g} stands in its text {text!r} and not among its values"] if more else []


def quote_problems(run: Run, entry: Table, quote: Quote) -> list[str]:
    """Figures of a quote that are neither in its row nor claimed of the run."""
    if quote.row not in entry.rows:
        return [f"{entry.id}: a quote of {quote.page} has the row {quote.row!r}; the rows are {', '.join(entry.rows)}"]
    cells = [value for cell in entry.rows[quote.row] for value in (cell if isinstance(cell, list) else [cell])]
    known = [value for value in cells if value is not None] + [value for claim in run.claims for value in claim.values]
    place = Place(0, single(quote.text), "" if "|" in quote.text else None)
    said = [figure for begin, end in place.figures() for figure in written(place.text[begin:end])]
    wrong = [value for value, decimals in said if not any(round(one, decimals) == value for one in known)]
    return (
        [f"{entry.id}: {wrong[0]:g} in {quote.text!r} of {quote.page} is not in the row {quote.row!r}"] if wrong else []
    )


def table_problems(entry: Table, page: str, others: set[str]) -> list[str]:
    """others: rows of the same table that are claimed, by this or another claim."""
    cells = entry.cells(page)
    if not cells:
        return [f"{entry.id}: {entry.where} has no table that begins {entry.head!r}"]
    problems = []
    columns = list(next(iter(cells.values())))
    asked = [*entry.key, *entry.columns, *entry.settings]
    if unknown := [name for name in asked if name not in columns]:
        return [f"{entry.id}: {entry.where} has no column {unknown[0]!r}; it has {', '.join(columns)}"]
    for name in columns:
        measured = [row[name] for row in cells.values() if BARE.match(row.get(name, ""))]
        if measured and name not in asked:
            problems.append(f"{entry.id}: the column {name!r} has figures and is neither claimed nor a setting")
    for key, row in cells.items():
        if key in others and key not in entry.rows:
            continue
        claimed = entry.rows.get(key)
        like = claimed or [None] * len(entry.columns)
        said = [cell_values(row[name], old) for name, old in zip(entry.columns, like, strict=True)]
        if claimed != said:
            problems.append(f"{entry.id}: {entry.where} has the row  {key!r}: {said}  and the claim {claimed}")
    problems += [f"{entry.id}: {entry.where} has no row {key!r}" for key in entry.rows if key not in cells]
    return problems


def cell_values(cell: str, like: Any = None) -> Any:
    """The number of a cell, None where it has none; as many numbers as a list that is given has."""
    if cell in NO_FIGURE:
        return None
    there = numbers(cell)
    there = [int(n) if n == int(n) and abs(n) < 1e15 else n for n in there]
    if isinstance(like, list):
        return there[: len(like)]
    return there[0] if there else None


def unclaimed(name: str, place: Place, covered: list[str]) -> Iterator[str]:
    spans = [(match.start(), match.end()) for text in covered for match in re.finditer(re.escape(text), place.text)]
    for begin, end in place.figures():
        if not any(start <= begin and end <= stop for start, stop in spans):
            around = place.text[max(0, begin - 25) : end + 15]
            row = "" if place.head is None else f"; its table begins {place.head[:50]!r}"
            yield f"{name}:{place.line}: {place.text[begin:end]!r} in …{around}… is claimed by nothing{row}"
