"""`zellige tables`: counts codes, so that a model can compress images without its prior too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.model_io import load_pretrained, model_folder
from pipelines.codec.shard_tables import tables_of_shards
from pipelines.codec.tables import TABLES_NAME
from pipelines.model_folders import INDEX_NAME
from stage1_vq.autoencoders import AUTOENCODERS


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Adds frequency tables of codes to a model folder that is there already."""

    model: str  # local folder: assembled model, or model or run folder of an autoencoder
    codes: str  # code shards of this autoencoder, that `zellige encode` wrote


def add_tables(config: TablesConfig) -> str:
    """Writes tables.safetensors into the folder; returns one line. Raises UserError for codes of another model."""
    path = Path(config.model)
    assembled = [folder for folder in (path, path / "model") if (folder / INDEX_NAME).is_file()]
    folder = assembled[0] if assembled else model_folder(config.model)
    tables = tables_of_shards(config.codes, load_pretrained(folder / "stage1" if assembled else folder, AUTOENCODERS))
    tables.save(folder)
    contexts = "; ".join(f"{name}: {' and '.join(own.tables)}" for name, own in tables.grids.items())
    following = f"zellige compress --model {config.model} --mode table --images DIR --out DIR"
    return f"tables are in {folder / TABLES_NAME} ({contexts}); next: {following}"
