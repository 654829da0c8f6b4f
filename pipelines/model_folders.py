"""Where a model lies: an assembled one has a folder for each stage, a run has its model in a folder of its own, and the
Hugging Face hub has either."""

from __future__ import annotations

from pathlib import Path

from common.model_io import CONFIG_NAME, model_folder
from pipelines.folder_kinds import (
    ASSEMBLED,
    COMPRESSED,
    LATENT_SHARDS,
    QUICKSTART,
    SHARDS,
    check_draws_images,
    check_kind,
)

INDEX_NAME = "model_index.json"


def pipeline_folder(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Local folder of an assembled model, for a path (a quickstart run stands for its `model/`) or a hub id; revision:
    branch, tag or commit of the hub. Raises UserError."""
    advice = "put both stages together by `zellige assemble --stage1 RUN --stage2 RUN --out MODEL` and name that"
    check_draws_images(Path(folder_or_hub_id))
    check_kind(Path(folder_or_hub_id), "an assembled model", advice, among=(ASSEMBLED, QUICKSTART))
    return model_folder(folder_or_hub_id, INDEX_NAME, advice=advice, revision=revision)


def any_model_folder(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Local folder of a model of images, assembled or single, for a path or a hub id; revision: branch, tag or commit
    of the hub. Raises UserError, which names the command to use for a model of a table or of sequences."""
    check_kind(Path(folder_or_hub_id), "a model", "name its folder, or a run", but=(SHARDS, LATENT_SHARDS, COMPRESSED))
    check_draws_images(Path(folder_or_hub_id))
    folder = model_folder(folder_or_hub_id, INDEX_NAME, CONFIG_NAME, revision=revision)
    check_draws_images(folder)  # of a hub id it is known only now
    return folder


def stage_folder(folder_or_hub_id: str | Path, stage: str, revision: str | None = None) -> Path:
    """The part "stage1" or "stage2" of an assembled model or a quickstart run; a single model as it is. Raises
    UserError."""
    folder = any_model_folder(folder_or_hub_id, revision)
    return folder / stage if (folder / INDEX_NAME).is_file() else folder
