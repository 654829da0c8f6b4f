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


def random_places(codes: Codes, share: float, uniforms: Tensor) -> tuple[Tensor, ...]:
    """A random `share` of the places of each grid, rounded to whole ones: bool, one `b h w` per grid. `uniforms`, `b n`
    over all grids, decide which: a larger share has all places of a smaller one, and more. Grids of the same sides have
    the same: the codes of a place add up to one latent, or are parts of one."""
    parts = uniforms.to(codes[0].device).split([grid[0].numel() for grid in codes], dim=1)
    of_sides: dict[torch.Size, Tensor] = {}
    for grid, part in zip(codes, parts, strict=True):
        places = rearrange(rank(part) < round(share * part.shape[1]), "b (h w) -> b h w", h=grid.shape[1])
        of_sides.setdefault(grid.shape[1:], places)
    return tuple(of_sides[grid.shape[1:]] for grid in codes)


def codes_but_a_share(codes: Codes, share: float, uniforms: Tensor) -> Codes:
    """The codes, -1 at `random_places`."""
    places = random_places(codes, share, uniforms)
    return tuple(grid.masked_fill(drawn, DRAWN) for grid, drawn in zip(codes, places, strict=True))


def codes_at(places: tuple[Tensor, ...], taken: Codes, others: Codes) -> Codes:
    """The codes of `taken` at the places, bool, and those of `others` elsewhere: one `b h w` per grid each."""
    return tuple(torch.where(*parts) for parts in zip(places, taken, others, strict=True))
