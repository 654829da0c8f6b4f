"""`zellige impute`: the missing numbers of a table, filled in by a model that was trained on such tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError, check_fields
from common.wording import counted
from pipelines.devices import open_device
from stage1_vae.tables.data import Table, read_table, write_table
from stage1_vae.tables.miwae import MIWAE, impute
from stage1_vae.tables.models import load_table_model


@dataclass(frozen=True, kw_only=True)
class ImputeConfig:
    """Writes a table in which nothing is missing: its own cells as they stand, and estimates in the empty ones."""

    model: str  # run or model folder of `zellige train-table`, or a hub id
    table: str  # CSV file with the columns that the model was trained on; others are copied
    out: str  # CSV file to write; with `multiple` NAME_1.csv, NAME_2.csv ...
    multiple: int = 0  # tables, each of which draws what is missing; 0: one table, with its mean given what is seen
    draws: int = 1000  # of each row's latents, which the weights are of: more are more exact
    seed: int = 0  # of these draws
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("multiple", self.multiple >= 0, "0 or more"),
                ("draws", self.draws >= 1, "at least 1; 1000 is usual"),
                ("seed", self.seed >= 0, "0 or more"),
            ],
        )


def impute_file(config: ImputeConfig) -> str:
    """Returns one line: how much was missing and where the tables are. Raises UserError."""
    source, out = Path(config.table), Path(config.out)
    if out.is_dir() or out.suffix.lower() not in (".csv", ".tsv"):
        raise UserError(f"out={out}, expected a file to write such as filled.csv")
    _, device = open_device(config.device)
    model = load_table_model(config.model, device=device)
    if not isinstance(model, MIWAE):
        raise UserError(
            f"{config.model} is a model of kind {model.kind}, expected miwae, which knows missing numbers; counts are "
            "never missing, `zellige encode-table --denoised` smooths them"
        )
    table = read_table(source)
    rows = model.rows(table).to(device)
    missing = rows.isnan()
    names = [out.with_stem(f"{out.stem}_{number}") for number in range(1, config.multiple + 1)] or [out]
    if any(name.resolve() == source.resolve() for name in names):
        raise UserError(f"out={out} is the table itself, expected another file")
    found = impute(model, rows, draws=config.draws, multiple=config.multiple, seed=config.seed)
    for name, completed in zip(names, found.multiple if config.multiple else [found.single], strict=True):
        write_table(name, table.header, filled(table, model.columns, missing, model.numbers(completed)))
    where = str(out) if not config.multiple else f"{names[0]} to {names[-1]}"
    incomplete = missing.any(dim=1)
    worth = float(found.effective_draws[incomplete].median()) if bool(incomplete.any()) else float(config.draws)
    return (
        f"{counted(int(missing.sum()), 'missing number')} of {missing.numel():,} filled in, in {where}; the weights of "
        f"a typical row are worth {worth:.0f} of {config.draws} draws"
    )


def filled(table: Table, columns: Sequence[str], missing: Tensor, values: Tensor) -> list[list[str]]:
    """The cells of a table, those of missing numbers (n p) with values (n p) in their place."""
    rows = [list(cells) for cells in table.cells]
    places = [table.place(column) for column in columns]
    numbers = values.cpu().numpy()
    for row, column in np.argwhere(missing.cpu().numpy()):
        rows[row][places[column]] = f"{numbers[row, column]:.6g}"
    return rows
