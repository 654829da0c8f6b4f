"""Tables: CSV files with a header, numbers in their cells, and empty cells, `nan` or `NA` where a number is missing."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError, check_fields
from common.files import atomic_file
from common.wording import counted
from training.task import Batch

MISSING = ("", "nan", "na")  # in any case, blanks aside


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Rows to learn from. All columns are numbers but those that are named for something else."""

    path: str = ""  # a CSV file with a header; its columns are parted by tabs where it is called .tsv
    id_column: str | None = None  # names of the rows: no numbers, and kept in what is written
    batch_column: str | None = None  # for counts: of which experiment a row is, a name or a number
    category_columns: tuple[str, ...] = ()  # for counts: further ones that say what a row is of
    covariate_columns: tuple[str, ...] = ()  # for counts: numbers that are known of a row and not modelled
    validation_path: str | None = None  # a table of held-out rows; left out: they are taken from `path`
    validation_share: float = 0.1  # of the rows, which are held out; at least one, unless 0
    validation_seed: int = 0  # which ones

    def __post_init__(self) -> None:
        for name in ("category_columns", "covariate_columns"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        special = [name for name in (self.id_column, *self.categories, *self.covariate_columns) if name is not None]
        check_fields(
            self,
            [
                ("validation_share", 0 <= self.validation_share < 1, "0 or more, less than 1"),
                ("validation_seed", self.validation_seed >= 0, "0 or more"),
            ],
        )
        if len(set(special)) < len(special):
            raise UserError(f"table: {', '.join(special)} name a column twice, expected each for one purpose")

    @property
    def categories(self) -> tuple[str, ...]:
        """All columns that say what a row is of, the batch first."""
        return (*(() if self.batch_column is None else (self.batch_column,)), *self.category_columns)


@dataclass(frozen=True)
class Table:
    """Cells as they stand in a file."""

    path: Path
    header: tuple[str, ...]
    cells: Sequence[Sequence[str]]  # n rows
    lines: Sequence[int]  # n, where each begins in the file, from 1, which is the header's if nothing is above it

    def __len__(self) -> int:
        return len(self.cells)

    def where(self, row: int) -> str:
        """A row for messages, as whoever opens the file finds it: of a part of a table too, and below empty lines."""
        return f"{self.path}, line {self.lines[row]}"

    def place(self, column: str) -> int:
        """Where a column stands. Raises UserError for one that there is not."""
        if column not in self.header:
            raise UserError(
                f"{self.path} has no column {column!r}, expected it among {shortened(self.header)}: name a column as "
                "the header does"
            )
        return self.header.index(column)

    def texts(self, column: str) -> list[str]:
        """Raises UserError for an empty cell: what stands here is a name."""
        place = self.place(column)
        found = [cells[place].strip() for cells in self.cells]
        if "" in found:
            raise UserError(
                f"{self.where(found.index(''))}, column {column!r} is empty, expected a name: it says what the row is "
                "of; fill it in or leave the row out"
            )
        return found

    def numbers(self, columns: Sequence[str]) -> NDArray[np.float64]:
        """n p, nan where a number is missing. Raises UserError for what is no number, with its line
        and column."""
        places = [self.place(column) for column in columns]
        values = np.empty((len(self), len(columns)))
        for row, cells in enumerate(self.cells):
            try:
                values[row] = [as_number(cells[place]) for place in places]
            except ValueError:
                name, cell = first_without_number(columns, [cells[place] for place in places])
                raise UserError(
                    f"{self.where(row)}, column {name!r} holds {cell!r}, expected a number, or an empty cell "
                    "where it is missing; a column of names is left out of the table or named by --table.id_column"
                ) from None
        return values

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.header).encode())
        for cells in self.cells:
            digest.update(repr(tuple(cells)).encode())
        return digest.hexdigest()


def as_number(cell: str) -> float:
    """nan of a missing one. Raises ValueError, also for what is infinite."""
    text = cell.strip()
    if text.lower() in MISSING:
        return math.nan
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def first_without_number(columns: Sequence[str], cells: Sequence[str]) -> tuple[str, str]:
    for column, cell in zip(columns, cells, strict=True):
        try:
            as_number(cell)
        except ValueError:
            return column, cell
    raise AssertionError("all cells are numbers")


def shortened(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_table(path: str | Path) -> Table:
    """Raises UserError for a file that is no table: not there, not text, without a header or rows, with a column named
    twice, or a row longer or shorter than the header."""
    path = Path(path).expanduser()
    if not str(path) or not path.is_file():
        raise UserError(f"there is no file {path}, expected a table: a CSV file with a header; name it")
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            numbered = list(numbered_rows(file, separator))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as a table: {error}; save it as CSV in UTF-8, or as text parted by tabs called .tsv"
        ) from error
    if len(numbered) < 2:
        raise UserError(f"{path} holds {counted(len(numbered), 'line')}, expected a header and rows below it")
    (_, *lines), (names, *rows) = zip(*numbered, strict=True)
    header = tuple(name.strip() for name in names)
    if len(header) == 1 and any(sign in header[0] for sign in (";", "\t")):
        raise UserError(
            f"{path} has one column, {header[0]!r}, expected columns parted by commas; save it so, or call a file "
            "parted by tabs .tsv"
        )
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(
            f"{path} has several columns {f'called {twice[0]!r}' if twice[0] else 'without a name'}, expected another "
            "name for each"
        )
    table = Table(path, header, rows, lines)
    for row, cells in enumerate(rows):
        if len(cells) != len(header):
            raise UserError(
                f"{table.where(row)} has {counted(len(cells), 'cell')}, expected {len(header)} as in the header"
            )
    return table


def numbered_rows(file: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The line where each row begins, from 1, and its cells, of which quoted ones may go on over several lines. Lines
    without any are passed over."""
    reader, line = csv.reader(file, delimiter=separator), 1
    for cells in reader:
        if cells:
            yield line, cells
        line = reader.line_num + 1


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Atomically; parted by tabs where the file is called .tsv."""
    path = Path(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def number_columns(table: Table, config: TableConfig) -> tuple[str, ...]:
    """The columns that are modelled. Raises UserError where none is left, a named one is not there, or one has no name:
    it is most likely none of numbers to model, but counts the rows."""
    special = {config.id_column, *config.categories, *config.covariate_columns} - {None}
    for name in sorted(name for name in special if name is not None):
        table.place(name)
    columns = tuple(name for name in table.header if name not in special)
    if "" in columns:
        raise UserError(
            f"{table.path}, column {table.header.index('') + 1} has no name, expected one for each: where it counts "
            "the rows, as pandas' to_csv writes it, call it id, say, and give --table.id_column id, or leave it out "
            "(index=False)"
        )
    if not columns:
        raise UserError(f"{table.path} has no column of numbers beside {', '.join(map(str, special))}; add some")
    return columns


def split_table(table: Table, config: TableConfig) -> tuple[Table, Table]:
    """Rows to train on, and held-out ones. Raises UserError where none would be left to train on."""
    if config.validation_path is not None:
        held_out = read_table(config.validation_path)
        if missing := [name for name in table.header if name not in held_out.header]:
            raise UserError(f"{held_out.path} has no column {missing[0]!r}, expected those of {table.path}")
        return table, held_out
    count = max(1, round(config.validation_share * len(table))) if config.validation_share else 0
    if count >= len(table):
        raise UserError(f"{table.path} has {counted(len(table), 'row')}, and none is left to train on; add rows")
    order = np.random.default_rng(config.validation_seed).permutation(len(table))
    train, held = np.sort(order[count:]), np.sort(order[:count])
    return rows_of(table, train), rows_of(table, held)


def rows_of(table: Table, indices: Iterable[int]) -> Table:
    chosen = list(indices)
    return replace(
        table, cells=[table.cells[index] for index in chosen], lines=[table.lines[index] for index in chosen]
    )


class Rows:
    """training.task.Dataset of rows as a model sees them: "rows", "numbers", where each stands among them, and "draws",
    the number of the draw in the run."""

    def __init__(self, rows: Tensor) -> None:
        """rows: n p."""
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        chosen = torch.tensor(indices)
        return {"rows": self.rows[chosen], "numbers": chosen, "draws": torch.tensor(draws)}
