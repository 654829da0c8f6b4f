"""`zellige tables`: counts codes, so that a model can compress images without its prior too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codes.shards import CodeDataset
from common.errors import UserError
from common.model_io import load_pretrained, model_folder
from pipelines.codec.tables import TABLES_NAME, CodeTables, fit_tables_to_shards
from pipelines.model_folders import INDEX_NAME
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder


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


def tables_of_shards(folder: str, autoencoder: Autoencoder) -> CodeTables:
    """Tables of the training images of code shards. Raises UserError unless this autoencoder made them."""
    codes = CodeDataset(folder)
    check_made_by(codes, autoencoder)
    if len(codes) == 0:
        raise UserError(f"{folder} holds no training images to count; encode some")
    return fit_tables_to_shards(codes)


def check_made_by(codes: CodeDataset, autoencoder: Autoencoder) -> None:
    """Raises UserError unless this autoencoder made the codes; of codes that do not say who did, only their shape is
    compared."""
    recorded, actual = codes.stage1_fingerprint, autoencoder.fingerprint()
    spec = autoencoder.code_spec(codes.code_spec.image_height, codes.code_spec.image_width)
    if codes.code_spec != spec or recorded not in ("", actual):
        raise UserError(
            f"{codes.folder} holds codes of autoencoder {recorded[:12]}, {codes.code_spec.describe()}, expected those "
            f"of {actual[:12]}, {spec.describe()}; encode images with this model"
        )
