"""The names of what networks can compute in (common/computing.py), without torch: options of commands name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from common.errors import UserError
from common.wording import either

Precision = Literal["bf16", "fp16", "tf32"]
AnyPrecision = Literal["no", "bf16", "fp16", "tf32"]
"""With a word for none of them, where leaving it out means something else."""


def as_meant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of sampling as a model or a folder records them, among others, with what earlier builds left unsaid:
    their precision was that of the prior alone."""
    of_codes = "top_k" in settings  # not those of a VAE, or of images through stage one
    unsaid = of_codes and settings.get("precision") is not None and "decoder_precision" not in settings
    return {**settings, "decoder_precision": "no"} if unsaid else dict(settings)


def check_precision(name: str, value: str | None, known: tuple[str, ...] = get_args(Precision)) -> None:
    """Raises UserError for an option's value that is none."""
    if value is not None and value not in known:
        raise UserError(f"{name}={value}, expected {either(known)}; leave it out for the type of the weights")
