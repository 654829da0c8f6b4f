"""Which codes of an image are kept and which are drawn anew. A code of -1 is to be drawn (stage2_prior/sampling.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from codes.spec import Codes
from stage2_prior.priors.masked import rank

DRAWN = -1


def codes_of_kept_pixels(codes: Codes, keep: Tensor) -> Codes:
    """The codes of places whose pixels are all kept, -1 elsewhere: one `b h w` per grid.

    keep: `b H W` or `H W`, bool, True for a pixel that stays. A code tells of the pixels around its place too, so what
    is drawn can show through for some pixels inside the border of what is kept.
    """
    changed = (~keep if keep.ndim == 3 else ~keep[None]).float()[:, None]  # b 1 H W
    changed = changed.to(codes[0].device).expand(len(codes[0]), -1, -1, -1)
    places = [F.adaptive_max_pool2d(changed, tuple(grid.shape[1:]))[:, 0] > 0 for grid in codes]
    return tuple(grid.masked_fill(drawn, DRAWN) for grid, drawn in zip(codes, places, strict=True))


def codes_but_a_share(codes: Codes, share: float, uniforms: Tensor) -> Codes:
    """The codes, -1 at a random `share` of the places of each grid, rounded to whole places. `uniforms`, `b n` over all
    grids, decide which: a larger share draws all that a smaller one does, and more."""
    parts = uniforms.to(codes[0].device).split([grid[0].numel() for grid in codes], dim=1)
    return tuple(
        grid.masked_fill(rearrange(rank(part) < round(share * part.shape[1]), "b (h w) -> b h w", h=grid.shape[1]), -1)
        for grid, part in zip(codes, parts, strict=True)
    )


def codes_between(first: Codes, second: Codes, share: float, uniforms: Tensor) -> Codes:
    """Codes of `first` with a random `share` of the places of each grid taken from `second`: a step on a walk from one
    to the other, on which every place changes once. Arguments as for `codes_but_a_share`."""
    taken = codes_but_a_share(first, share, uniforms)
    return tuple(torch.where(part == DRAWN, new, part) for part, new in zip(taken, second, strict=True))


def rectangle(height: int, width: int, part: str) -> Tensor:
    """`H W` bool, True in the named part of an image: left, right, top or bottom half, or the middle (half of each
    side)."""
    keep = torch.zeros(height, width, dtype=torch.bool)
    rows, columns = {
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "top": (slice(0, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "middle": (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)),
    }[part]
    keep[rows, columns] = True
    return keep
