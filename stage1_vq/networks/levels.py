"""What the configs of residual networks on several levels of resolution have in common."""

from __future__ import annotations

from typing import Protocol

from common.errors import UserError


class LevelSettings(Protocol):
    """The fields by which configs speak of such networks; encoder and decoder have the same levels."""

    @property
    def channels(self) -> int: ...  # c of the images
    @property
    def width(self) -> int: ...  # channels at the resolution of the images
    @property
    def multipliers(self) -> tuple[int, ...]: ...  # of the width, at each level; each after the first halves the sides
    @property
    def residual_blocks(self) -> int: ...  # at each level
    @property
    def norm_groups(self) -> int: ...  # of the group norms


def check_levels(config: LevelSettings) -> None:
    """Raises UserError for a number below 1, and for norms whose groups do not divide the channels."""
    for name in ("channels", "width", "residual_blocks", "norm_groups"):
        if getattr(config, name) < 1:
            raise UserError(f"model.{name}={getattr(config, name)}, expected at least 1")
    if min(config.multipliers, default=0) < 1:
        raise UserError(f"model.multipliers={config.multipliers}, expected one or more numbers from 1 up")
    if config.width % config.norm_groups:
        raise UserError(
            f"model.norm_groups={config.norm_groups} does not divide model.width={config.width}: give a number that "
            "does"
        )
