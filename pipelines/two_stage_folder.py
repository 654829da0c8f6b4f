"""The folder of a two-stage pipeline: model_index.json, both models, and how often each code occurs."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import atomic_folder, check_replaceable, read_json
from common.precision import as_meant
from common.sealed_json import check_seal, sealed
from pipelines.codec.tables import CodeTables, load_tables
from pipelines.model_folders import INDEX_NAME
from pipelines.stages import KIND, load_stages
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.priors import Prior
from stage2_prior.sampling import SamplingConfig


class TwoStageParts(NamedTuple):
    """What a two-stage pipeline is made of."""

    autoencoder: Autoencoder
    prior: Prior
    sampling: SamplingConfig
    tables: CodeTables | None


def write_two_stage(folder: Path, parts: TwoStageParts, fingerprint: str) -> None:
    """Atomically. Raises UserError rather than replace anything that is not a pipeline folder."""
    check_replaceable(folder, INDEX_NAME)
    index = {
        "kind": KIND,
        "zellige_version": version("zellige"),
        "fingerprint": fingerprint,
        "sampling": asdict(parts.sampling),
    }
    with atomic_folder(folder) as temporary:
        parts.autoencoder.save_pretrained(temporary / "stage1")
        parts.prior.save_pretrained(temporary / "stage2")
        if parts.tables is not None:
            parts.tables.save(temporary)
        (temporary / INDEX_NAME).write_text(json.dumps(sealed(index), indent=2) + "\n", encoding="utf-8")


def read_two_stage(folder: Path) -> TwoStageParts:
    """Of a local folder. Raises UserError for a folder of something else, and for stages that do not fit."""
    autoencoder, prior = load_stages(folder)
    index = read_json(folder / INDEX_NAME)
    check_seal(folder / INDEX_NAME, index, "assemble the model again, or copy it again from where it came")
    sampling = read_sampling(folder, index)
    return TwoStageParts(autoencoder, prior, sampling, load_tables(folder))


def read_sampling(folder: Path, index: dict[str, Any]) -> SamplingConfig:
    try:
        return SamplingConfig(**as_meant(index.get("sampling", {})))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / INDEX_NAME} has sampling settings that this version does not take: {error}"
        ) from error
