"""`zellige train-table`: a likelihood VAE learns the rows of a table, whatever of them is missing, or counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.options import read_recipe, split_device
from pipelines.trainings import check_table, train_table
from stage1_vae.tables.train import Stage1TableConfig


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-table", Stage1TableConfig, "tables", rest)
    check_table(config.table.path)

    def train() -> str:
        command, out = ("impute", "FILLED") if config.model.kind == "miwae" else ("encode-table", "LATENTS")
        following = f"zellige {command} --model {run} --table {config.table.path} --out {out}.csv"
        return train_table(config, run, device=device).summary(following)

    return train
