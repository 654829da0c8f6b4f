"""What a prior of one grid makes of the codes that it is given: coarser levels, or a smaller picture (Razavi et al.
2019, arXiv:1906.00446, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common.errors import UserError
from stage2_prior.priors.gated_convolutions import CodeConvolution, Convolution, GatedResidual


class GivenCodes(nn.Module):
    """Codes of the given grids -> features `b d h w` at the size of the prior's own grid.

    Each given grid goes through a convolution and residual blocks of its own, at its own size; its features are then
    repeated for every place that one of its codes stands for, and those of all given grids concatenated. Raises
    UserError where a given code does not stand for a whole number of rows and columns.
    """

    def __init__(
        self, given: Sequence[Grid], grid: Grid, width: int, blocks: int, kernel_size: int = 3, dropout: float = 0.0
    ):
        """width: channels of each given grid's features."""
        super().__init__()
        for one in given:
            if grid.height % one.height or grid.width % one.width:
                raise UserError(
                    f"got given codes of {one.height}x{one.width} for a prior of {grid.height}x{grid.width} codes, "
                    "expected sides that divide the prior's, so that each stands for a whole number of rows and columns"
                )
        self.size = grid.height, grid.width
        self.width = width * len(given)  # d
        convolution = partial(Convolution, kernel_size=kernel_size)
        self.stacks = nn.ModuleList(
            nn.Sequential(
                CodeConvolution(one.vocabulary, width, kernel_size),
                *(GatedResidual(width, width, convolution, dropout) for _ in range(blocks)),
            )
            for one in given
        )

    def forward(self, codes: Codes) -> Tensor:
        features = [stack(one) for stack, one in zip(cast("list[nn.Module]", self.stacks), codes, strict=True)]
        return torch.cat([F.interpolate(one, self.size, mode="nearest") for one in features], dim=1)
