"""Likelihood VAEs of tables by the `kind` of their config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.tables.counts import Counts, CountsConfig, counts_model
from stage1_vae.tables.data import Table, TableConfig, number_columns
from stage1_vae.tables.miwae import MIWAE, MIWAEConfig, columns_of
from stage1_vae.tables.model import TableVAE

TableModelConfig = MIWAEConfig | CountsConfig

MODELS: dict[str, Any] = {  # classes of TableVAE, each with a config class of its own
    "miwae": (MIWAE, MIWAEConfig),
    "counts": (Counts, CountsConfig),
}
MODEL_CLASSES: dict[str, type[TableVAE]] = {kind: model for kind, (model, _) in MODELS.items()}


def build_model(config: TableModelConfig, table: Table, training: Table, data: TableConfig) -> TableVAE:
    """A fresh model of the columns of a table, by its training rows. Raises UserError for a table that it cannot
    model."""
    if isinstance(config, CountsConfig):
        return counts_model(config, table, training, data)
    if known := (*data.categories, *data.covariate_columns):
        raise UserError(
            f"table: {', '.join(known)} are named as what is known of a row, expected no such column with "
            f"model.kind={config.kind}, which models all numbers: only counts have them"
        )
    return MIWAE(config, columns_of(table, training, number_columns(table, data)))


def load_table_model(folder_or_hub_id: str | Path, *, device: torch.device | str = "cpu") -> TableVAE:
    """Arguments and errors: those of `common.model_io.load_pretrained`."""
    return load_pretrained(folder_or_hub_id, MODEL_CLASSES, device=device)
