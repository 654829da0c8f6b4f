"""Likelihood VAEs that other projects published, by the `--kind` of `zellige import`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stage1_vae.imports.nvae import import_nvae
from stage1_vae.imports.titok import import_titok_vae
from stage1_vae.imports.vdvae import averaged_beside, import_vdvae
from stage1_vae.model import LikelihoodVAE


class Kind(NamedTuple):
    build: Callable[..., LikelihoodVAE]  # of a state dict, and a config or None
    places: tuple[str, ...] = ()  # in the file, where the state dict may lie, the best first; or it is the file itself
    arguments: str = ""  # in the file, where the original's command line may lie; for where no config is given
    averaged: Callable[[Path], Path | None] = lambda path: None  # of a file: another beside it, of averaged weights
    next: str = "generate --model {} --num 64 --out IMAGES"  # what one does with the folder of such a model


KINDS = {
    "titok-vae": Kind(import_titok_vae, next="reconstruct --model {} --images DIR --out IMAGES"),  # N(0, I) is no prior
    "nvae": Kind(import_nvae, places=("state_dict",), arguments="args"),
    "vdvae": Kind(import_vdvae, averaged=averaged_beside),
}

__all__ = ["KINDS", "Kind"]
