"""The order of places of the Halton sequence (Besnier et al. 2025, arXiv:2503.17076): any first few of them lie evenly
over the whole grid, far from each other, so codes that are filled in at the same step tell little about each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codes.spec import Grid


def halton_order(height: int, width: int) -> Tensor:
    """All places of a grid, each once, by their numbers in raster order: int64, `height * width`.

    Point i = 1, 2, ... lies in the row of its radical inverse in base 2 and in the column of that in base 3; a place
    comes when the first point falls into it. As published, but drawn in whole numbers until the grid is complete: the
    10,000 points of the published code leave out 6 places of 64x64 and 7,116 of 128x128, which then stay masked."""
    number = height * width
    points = 2 * number
    while True:
        rows, columns = (
            inverse * side // scale
            for side, (inverse, scale) in ((height, radical_inverses(points, 2)), (width, radical_inverses(points, 3)))
        )
        places, first = np.unique(rows * width + columns, return_index=True)
        if len(places) == number:
            return torch.from_numpy(places[first.argsort()])
        points *= 2


def radical_inverses(points: int, base: int) -> tuple[np.ndarray[Any, Any], int]:
    """The digits of 1, 2, ... `points` mirrored at the point, as numerators (int64) of one denominator."""
    left = np.arange(1, points + 1, dtype=np.int64)
    mirrored, scale = np.zeros_like(left), 1
    while left.any():
        mirrored = mirrored * base + left % base
        left //= base
        scale *= base
    return mirrored, scale


def halton_ranks(grids: Sequence[Grid]) -> Tensor:
    """When each code of a sequence comes, counted from 0: int64, `n`. Grid after grid, as finer codes mean something
    only after the coarser ones, and each in `halton_order`."""
    ranks, before = [], 0
    for grid in grids:
        ranks.append(before + halton_order(grid.height, grid.width).argsort())
        before += grid.size
    return torch.cat(ranks)
