"""The codes that a published prior models: those of an imported first stage, or what the original's files tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.foreign_weights import Arguments

STRIDE = 16  # pixels to a code, of most published first stages


class FirstStage(NamedTuple):
    code_spec: CodeSpec
    fingerprint: str | None = None  # of the autoencoder; None where it is not at hand
    latents: Mapping[str, Tensor] | None = None  # its `scale_latents`, of codes in scales

    def only_grid(self) -> Grid:
        """Raises UserError when its codes have several grids."""
        if len(self.code_spec.grids) != 1:
            raise UserError(
                f"the first stage makes {self.code_spec.describe()}, expected one grid, which this --kind of prior "
                "models; give --stage1 the model that it was trained with"
            )
        return self.code_spec.grids[0]


def published(vocabulary: int, side: tuple[int, int], stride: int = STRIDE) -> FirstStage:
    """A first stage of one grid, known by its sizes alone. side: codes (h, w)."""
    grid = Grid("codes", *side, vocabulary)
    return FirstStage(CodeSpec((grid,), side[0] * stride, side[1] * stride))


def both_sides(value: int | list[int]) -> tuple[int, int]:
    """(h, w) from one number or two, as the original's config gives it."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def side_of_square(sizes: list[int]) -> int | None:
    """The side of the first of these sizes that is a square."""
    return next((math.isqrt(size) for size in sizes if size > 0 and math.isqrt(size) ** 2 == size), None)


def check_vocabulary(grid: Grid, have: int) -> None:
    """Raises UserError unless the prior has an embedding for each code of the first stage."""
    if grid.vocabulary > have:
        raise UserError(
            f"the first stage has {grid.vocabulary} codes, the prior knows {have}; give --stage1 the model that it was "
            "trained with"
        )


def heads_of(arguments: Arguments, layers: int, width: int, published: dict[tuple[int, int], int]) -> int:
    """The number of heads, which no shape tells: `n_head` of the config, or that of the published model of these sizes,
    layers and width. Raises UserError."""
    heads = arguments.get("n_head") or published.get((layers, width))
    if heads is None:
        raise UserError(
            f"no published model has {layers} layers of width {width}, and no shape tells the number of heads; give "
            "n_head in --config"
        )
    return int(heads)
