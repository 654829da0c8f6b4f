"""What decoders by flow matching share (Lipman et al. 2022, arXiv:2210.02747): the noise that an image is decoded from,
which is a function of its codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codes.spec import Codes

MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # of splitmix64 (Steele et al. 2014)
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
BITS = 23  # of a uniform number: with half a step more it is exact in float32


def scrambled(x: Tensor) -> Tensor:
    """int64, as if of random bits: neighbours share nothing. Products wrap around, on every device alike."""
    x = x * GOLDEN + GOLDEN
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ shifted(x, shift)) * multiplier
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@torch.no_grad()
def noise_by_codes(codes: Codes, size: tuple[int, int, int], seed: int) -> Tensor:
    """Standard normal numbers, b c H W float32, each a function of the seed, its place in the image, the codes there.

    codes: one b h w per grid; size: c, H and W. Of a grid whose sides do not divide those of the image all codes count
    at every place.
    """
    channels, height, width = size
    device = codes[0].device
    key = scrambled(torch.full((1, 1, 1), seed, dtype=torch.int64, device=device))
    for number, grid in enumerate(codes):
        h, w = grid.shape[1:]
        if height % h or width % w:
            places = scrambled(torch.arange(h * w, device=device)).view(h, w)
            told = scrambled(grid + places).sum((1, 2), keepdim=True)
        else:
            told = grid.repeat_interleave(height // h, 1).repeat_interleave(width // w, 2)
        key = scrambled(key ^ scrambled(told + number))
    rows, columns = (torch.arange(side, device=device) for side in (height, width))
    place = scrambled(rows.unsqueeze(1) ^ scrambled(columns))  # H W
    key = scrambled(key ^ place).unsqueeze(1) + torch.arange(channels, device=device).view(-1, 1, 1)  # b c H W
    uniform = (shifted(scrambled(key), 64 - BITS).float() + 0.5) / 2**BITS
    return normal_of(uniform)


def normal_of(uniform: Tensor) -> Tensor:
    """The inverse CDF of the standard normal distribution."""
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)  # not ndtri, which not every device has
