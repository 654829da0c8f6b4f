"""`zellige encode-table`: the latents of each row of a table, and counts without their noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, check_fields
from common.wording import counted
from pipelines.devices import open_device
from stage1_vae.tables.counts import Counts
from stage1_vae.tables.data import read_table, write_table
from stage1_vae.tables.models import load_table_model

AT_ONCE = 1024  # rows


@dataclass(frozen=True, kw_only=True)
class EncodeTableConfig:
    """Writes a table of latents, z1, z2 ..., the means of the rows' posteriors; of counts also a denoised one."""

    model: str  # run or model folder of `zellige train-table`, or a hub id
    table: str  # CSV file with the columns that the model was trained on
    out: str  # CSV file of latents
    id_column: str | None = None  # names of rows, copied in front of what is written
    denoised: str | None = None  # of a model of counts: CSV file for the expected counts, without surplus zeros
    total: float | None = None  # what a row of these adds up to; left out: as much as its own counts, or about that
    batch: str | None = None  # a batch, as whose rows all are written there; left out: each as one of its own
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        check_fields(self, [("total", self.total is None or self.total > 0, "above 0; 10000 is usual")])
        if self.denoised is None and (self.total is not None or self.batch is not None):
            raise UserError("total and batch are of the denoised counts, got none of these; give --denoised")


def encode_file(config: EncodeTableConfig) -> str:
    """Returns one line that tells what was made and where. Raises UserError."""
    files = [path for path in (config.table, config.out, config.denoised) if path is not None]
    if len({Path(path).resolve() for path in files}) < len(files):
        raise UserError(f"{', '.join(files)} name a file twice, expected another for each")
    _, device = open_device(config.device)
    model = load_table_model(config.model, device=device)
    if config.denoised is not None and not isinstance(model, Counts):
        raise UserError(
            f"denoised={config.denoised} of a model of kind {model.kind}, expected one of counts; missing numbers are "
            "filled in by `zellige impute`"
        )
    if isinstance(model, Counts) and config.batch is not None:
        model.number_of_batch(config.batch)  # raises for one that there is not, before anything is written
    table = read_table(config.table)
    rows = model.rows(table).to(device)
    names = [[]] * len(table) if config.id_column is None else [[name] for name in table.texts(config.id_column)]
    first = [] if config.id_column is None else [config.id_column]

    def write(path: str, header: list[str], values: Tensor) -> None:
        cells = ([*name, *(f"{value:.6g}" for value in row)] for name, row in zip(names, values.tolist(), strict=True))
        write_table(path, [*first, *header], cells)

    latents = in_parts(model.encode, rows)
    write(config.out, [f"z{number + 1}" for number in range(latents.shape[1])], latents)
    made = f"{latents.shape[1]} latents of each of {counted(len(table), 'row')} in {config.out}"
    if config.denoised is None:
        return made
    assert isinstance(model, Counts)
    counts = model
    denoised = in_parts(lambda few: counts.denoised(few, total=config.total, batch=config.batch), rows)
    write(config.denoised, list(model.columns), denoised)
    return f"{made}, denoised counts in {config.denoised}"


@torch.inference_mode()
def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return torch.cat([function(few) for few in rows.split(AT_ONCE)]).cpu()
