"""Priors that other projects published, by the `--kind` of `zellige import`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from common.errors import UserError
from common.foreign_weights import Arguments
from common.renaming import Weights
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.imports.halton_maskgit import build_halton_maskgit
from stage2_prior.imports.ibq_gpt import build_ibq_gpt
from stage2_prior.imports.infinity import build_infinity
from stage2_prior.imports.llamagen import build_llamagen
from stage2_prior.imports.open_magvit2_gpt import build_open_magvit2_gpt
from stage2_prior.imports.pixelsnail import build_pixelsnail
from stage2_prior.imports.randar import build_randar
from stage2_prior.imports.rar import build_rar
from stage2_prior.imports.taming import build_gpt, build_net2net
from stage2_prior.imports.titok_maskgit import build_titok_maskgit
from stage2_prior.imports.var import build_var
from stage2_prior.priors.base import Prior


class Kind(NamedTuple):
    build: Callable[..., Prior]  # of a state dict, a config or None, and a FirstStage or None
    places: tuple[str, ...] = ()  # in the file, where the state dict may lie, the best first; or it is the file itself


def build_level(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> Prior:
    """A PixelSNAIL over one level of the codes of `stage1`. Raises UserError."""
    prior = build_pixelsnail(weights, config)
    if stage1 is not None:
        levels = (*prior.given, *prior.code_spec.grids)
        if stage1.code_spec.grids[: len(levels)] != levels:
            ours = " given ".join(f"{grid.height}x{grid.width} codes of {grid.vocabulary}" for grid in levels[::-1])
            raise UserError(
                f"the weights are of a prior of {ours}, and the first stage makes {stage1.code_spec.describe()}; give "
                "--stage1 the model that it was trained with, imported with the --image_size of its images"
            )
        prior.code_spec = replace(stage1.code_spec, grids=prior.code_spec.grids)
        prior.stage1_fingerprint = stage1.fingerprint
    return prior


KINDS = {
    "taming-gpt": Kind(build_gpt, ("state_dict",)),
    "taming-net2net": Kind(build_net2net, ("state_dict",)),
    "llamagen-gpt": Kind(build_llamagen, ("model", "module", "state_dict")),
    "rar": Kind(build_rar),
    "randar": Kind(build_randar, ("model", "module", "state_dict")),
    "ibq-gpt": Kind(build_ibq_gpt, ("state_dict",)),
    "open-magvit2-gpt": Kind(build_open_magvit2_gpt, ("state_dict",)),
    "var": Kind(build_var, ("trainer.var_wo_ddp",)),
    "infinity": Kind(build_infinity),
    "pixelsnail": Kind(build_level, ("model",)),
    "halton-maskgit": Kind(build_halton_maskgit, ("model_state_dict",)),
    "titok-maskgit": Kind(build_titok_maskgit, ("model_state_dict", "state_dict")),
}

__all__ = ["KINDS", "FirstStage", "Kind"]
