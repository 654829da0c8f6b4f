"""Priors that other projects published, by the `--kind` of `zellige import`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.imports.llamagen import build_llamagen
from stage2_prior.imports.taming import build_gpt, build_net2net
from stage2_prior.priors.base import Prior


class Kind(NamedTuple):
    build: Callable[..., Prior]  # of a state dict, a config or None, and a FirstStage or None
    places: tuple[str, ...] = ()  # in the file, where the state dict may lie, the best first; or it is the file itself


KINDS = {
    "taming-gpt": Kind(build_gpt, ("state_dict",)),
    "taming-net2net": Kind(build_net2net, ("state_dict",)),
    "llamagen-gpt": Kind(build_llamagen, ("model", "module", "state_dict")),
}

__all__ = ["KINDS", "FirstStage", "Kind"]
