"""Beam search for the codes of a sum of vectors: of each latent several beginnings are kept, not the nearest code of
each layer alone, and in the end the one whose sum is nearest (Babenko & Lempitsky 2014, "Additive quantization for
extreme vector compression"). The same bits for a smaller error, at the price of time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from codes.spec import Codes
from common.compatibility import never_compiled
from common.float32 import full_precision

TILE = 2**22  # numbers of scores or vectors at a time: 16 MB


def score(before: Tensor, left: Tensor) -> Tensor:
    """By what beginnings are compared, n m k: the squared error that they leave; before: their score without the last
    layer, n m."""
    return left


@never_compiled
@torch.no_grad()
def beam_search(
    latents: Tensor,
    depth: int,
    vectors: Callable[[int, Tensor], Tensor],
    beam: int,
    chosen: Codes = (),
    numbers: int = 0,
) -> Codes:
    """The codes of latents, b d h w, one b h w for each of `depth` layers.

    vectors: of a layer's number and the sums so far, n m d, its code vectors: k d, or n m k d where they depend on the
    sum; beam: beginnings that are kept; chosen: codes of the first layers, b h w each, that somebody else chose;
    numbers: that one sum needs of memory while its vectors are made.
    """
    rows = rearrange(latents, "b d h w -> (b h w) d")
    given = [grid.flatten() for grid in chosen]
    k = vectors(0, rows[:1].unsqueeze(1) * 0).shape[-2]
    size = max(1, TILE // (beam * max(k, numbers)))
    with full_precision():
        found = [
            search_rows(tile, depth, vectors, beam, [grid[start : start + size] for grid in given])
            for start, tile in ((start, rows[start : start + size]) for start in range(0, len(rows), size))
        ]
    b, _, h, w = latents.shape
    return tuple(rearrange(torch.cat(found), "(b h w) layers -> layers b h w", b=b, h=h, w=w).unbind(0))


def beam_search_after(
    latents: Tensor,
    depth: int,
    vectors: Callable[[int, Tensor], Tensor],
    beam: int,
    chosen: Codes,
    numbers: int = 0,
) -> Codes:
    """As `beam_search`, where latents whose own codes begin as those that were chosen keep them: below such a beginning
    alone a beam sees further, and might find others."""
    own = beam_search(latents, depth, vectors, beam, numbers=numbers)
    if not chosen:
        return own
    found = beam_search(latents, depth, vectors, beam, chosen, numbers)
    begun = torch.stack([grid == given for grid, given in zip(own, chosen, strict=False)]).all(0)
    return tuple(torch.where(begun, grid, other) for grid, other in zip(own, found, strict=True))


def search_rows(
    rows: Tensor, depth: int, vectors: Callable[[int, Tensor], Tensor], beam: int, given: Sequence[Tensor]
) -> Tensor:
    """rows: n d; returns n `depth`."""
    n, d = rows.shape
    sums, scores = rows.new_zeros(n, 1, d), rows.new_zeros(n, 1)
    codes = torch.zeros(n, 1, 0, dtype=torch.int64, device=rows.device)
    each = torch.arange(n, device=rows.device).unsqueeze(1)
    for number in range(depth):
        book = vectors(number, sums)
        rest = rows.unsqueeze(1) - sums  # n m d
        if number < len(given):
            best = given[number].unsqueeze(1)  # n 1, for there is one beginning so far
            parent = torch.zeros_like(best)
        else:
            half = book.square().sum(-1) / 2
            products = rest @ book.mT if book.ndim == 2 else torch.einsum("nmd,nmkd->nmk", rest, book)
            left = rest.square().sum(-1, keepdim=True) + 2 * (half - products)  # n m k
            ranked = score(scores, left).flatten(1)
            kept = min(1 if number == depth - 1 else beam, ranked.shape[1])
            scores, flat = ranked.topk(kept, dim=1, largest=False)
            parent, best = flat // book.shape[-2], flat % book.shape[-2]
        added = book[best] if book.ndim == 2 else book[each, parent, best]
        sums = sums[each, parent] + added
        codes = torch.cat([codes[each, parent], best.unsqueeze(2)], 2)
    return codes[:, 0]
