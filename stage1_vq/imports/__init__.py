"""Autoencoders that other projects published, by the `--kind` of `zellige import`. DALL-E's, of two files, is apart:
see dalle.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from stage1_vq.autoencoders.base import Autoencoder
from stage1_vq.imports.diffusers import import_diffusers
from stage1_vq.imports.ibq import import_ibq
from stage1_vq.imports.infinity import import_infinity
from stage1_vq.imports.llamagen import import_llamagen
from stage1_vq.imports.maskgit_vqgan import import_maskgit_vqgan
from stage1_vq.imports.open_magvit2 import import_open_magvit2
from stage1_vq.imports.taming import import_gumbelvq, import_vqmodel
from stage1_vq.imports.tatitok import import_tatitok
from stage1_vq.imports.titok import import_titok
from stage1_vq.imports.var import import_var
from stage1_vq.imports.vqvae2 import import_vqvae2


class Kind(NamedTuple):
    build: Callable[..., Autoencoder]  # of a state dict, and a config or None
    places: tuple[str, ...] = ()  # in the file, where the state dict may lie, the best first; or it is the file itself


KINDS = {
    "taming-vqgan": Kind(import_vqmodel, ("state_dict",)),
    "taming-gumbelvq": Kind(import_gumbelvq, ("state_dict",)),
    "llamagen-vq": Kind(import_llamagen, ("ema", "model")),
    "var-vqvae": Kind(import_var, ("trainer.vae_local",)),
    "vqvae2": Kind(import_vqvae2),
    "diffusers-vqmodel": Kind(import_diffusers),
    "titok": Kind(import_titok),
    "tatitok": Kind(import_tatitok),
    "ibq": Kind(import_ibq, ("state_dict",)),
    "maskgit-vqgan": Kind(import_maskgit_vqgan),
    "open-magvit2": Kind(import_open_magvit2, ("state_dict",)),
    "infinity-vae": Kind(import_infinity, ("vae", "ema")),
}

__all__ = ["KINDS", "Kind"]
