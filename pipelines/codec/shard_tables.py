"""Frequency tables of a folder of code shards."""

from __future__ import annotations

from codes.shards import CodeDataset
from common.errors import UserError
from pipelines.codec.tables import CodeTables, fit_tables_to_shards
from pipelines.stages import check_made_by
from stage1_vq.autoencoders import Autoencoder


def tables_of_shards(folder: str, autoencoder: Autoencoder) -> CodeTables:
    """Tables of the training images of code shards. Raises UserError unless this autoencoder made them, and for damaged
    ones."""
    codes = CodeDataset(folder)
    check_made_by(codes, autoencoder)
    if len(codes) == 0:
        raise UserError(f"{folder} holds no training images to count; encode some")
    codes.verify()
    return fit_tables_to_shards(codes)
