"""docs/claims.yaml held against README and docs, both ways: what is claimed stands there, and what stands there is
claimed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.claims_file import NO_FIGURE, Claim, Claims, Quote, Run, Table
from benchmarks.claims_scan import BARE, Place, numbers, pages, places, single, written


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
        page = page_of(one.where, "exceptions")
        for text in one.texts:
            problems += text_problems("exceptions", text, one.where, page)
            if not Place(0, single(text)).figures():
                problems.append(f"exceptions: there is no figure in {text!r} of {one.where}")
            covered.setdefault(one.where, []).append(single(text))
        if one.table is not None:
            if not any((place.head or "").startswith(single(one.table)) for place in page):
                problems.append(f"exceptions: {one.where} has no table that begins {one.table!r}")
            tables.setdefault(one.where, []).append(single(one.table))
        if not one.texts and one.table is None:
            whole.add(one.where)
    for name, page in found.items():
        if name in whole:
            continue
        for place in page:
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
