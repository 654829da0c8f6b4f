"""What decoders by flow matching share (Lipman et al. 2022, arXiv:2210.02747): the noise that an image is decoded from,
which is a function of its codes; times of a training step; guidance."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from codes.spec import Codes
from common.draws import normal_like, stratified, uniform

# ---- noise that is a function of codes ------------------------------------------------------------------------------

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


# ---- times of a training step ---------------------------------------------------------------------------------------

Times = Literal["stratified", "logit-normal", "mode"]
MODE_SCALE = 1.29  # of Esser et al. 2024


def drawn_times(kind: Times, count: int, device: torch.device) -> Tensor:
    """`count` float32 from 0, the image, to 1, noise: most of them in the middle (Esser et al. 2024, arXiv:2403.03206,
    section 3.1).

    logit-normal: whose logits are standard normal; stratified: the same, one in each of as many equally likely parts as
    a step has samples; mode: of uniform numbers u, 1 - u - 1.29 (cos²(πu/2) - 1 + u).
    """
    if kind == "logit-normal":
        return normal_like(torch.empty(count, device=device)).sigmoid()
    if kind == "stratified":
        return normal_of(stratified(count, device).clamp(1e-6, 1 - 1e-6)).sigmoid()
    u = uniform(count, device=device)
    return 1 - u - MODE_SCALE * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


def towards_noise(t: Tensor, shift: float) -> Tensor:
    """Times, the more of them near 1, noise, the larger `shift` is; 1 leaves them (Esser et al. 2024, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


# ---- guidance -------------------------------------------------------------------------------------------------------

Form = Literal["normalised", "plain"]
MOMENTUM = -0.5  # of the difference, from step to step: what lasts is weakened
EPSILON = 1e-12  # of lengths


class Guidance:
    """Velocities that lead further from those without a condition, step after step of one decoding.

    plain: v0 + s (v - v0) (Ho & Salimans 2022, arXiv:2207.12598). normalised: v + (s - 1) d, of the difference v - v0
    with momentum, no longer than `longest`, the part across v (Sadat et al. 2024, arXiv:2410.02416), so that a large s
    does not make images garish.
    """

    def __init__(self, scale: float, form: Form, longest: float) -> None:
        """scale: s; longest: length of a difference, over all numbers of an image."""
        self.scale, self.form, self.longest = scale, form, longest
        self.average: Tensor | None = None

    def __call__(self, given: Tensor, without: Tensor) -> Tensor:
        """Velocities given the condition and without, b ... float32."""
        difference = given - without
        if self.form == "plain":
            return without + self.scale * difference
        if self.average is not None:
            difference = difference + MOMENTUM * self.average
        self.average = difference
        axes = tuple(range(1, given.ndim))
        length = difference.square().sum(axes, keepdim=True).sqrt().clamp(min=EPSILON)
        difference = difference * (self.longest / length).clamp(max=1)
        direction = given / given.square().sum(axes, keepdim=True).sqrt().clamp(min=EPSILON)
        across = difference - (difference * direction).sum(axes, keepdim=True) * direction
        return given + (self.scale - 1) * across
