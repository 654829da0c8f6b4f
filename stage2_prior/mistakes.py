"""Mistakes that training puts into the codes which a prior goes by (Han et al. 2024, arXiv:2412.04431, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from codes.spec import Codes, CodeSpec
from common.draws import uniform


def flipped(codes: Codes, share: float) -> list[Tensor]:
    """Which codes are to be given as others, bool `b h w` each: of each image and grid a share from 0 to `share`."""
    batch, device = len(codes[0]), codes[0].device
    shares = share * uniform(batch, len(codes), device=device)
    return [
        uniform(*grid.shape, device=device) < own[:, None, None]
        for grid, own in zip(codes, shares.unbind(1), strict=True)
    ]


def others(code_spec: CodeSpec, codes: Codes) -> list[Tensor]:
    """Codes of chance, `b h w` each, every one as probable."""
    return [
        (uniform(*codes[0].shape[:1], grid.height, grid.width, device=codes[0].device) * grid.vocabulary)
        .long()
        .clamp(max=grid.vocabulary - 1)
        for grid in code_spec.grids
    ]


def replaced(codes: Tensor, which: Tensor, by: Tensor) -> Tensor:
    return torch.where(which, by, codes)
