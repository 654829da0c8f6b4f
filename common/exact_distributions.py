"""Distribution functions in exact arithmetic: whole numbers that never fall, and the quantiles of the normal one.

Between multiples of 1/128 they are straight lines: these *are* the distributions, whose densities are those of the
normal and the logistic distribution to 1e-5 of an nat. So they rise with every rounding, and quantiles are their
inverse. The arithmetic is that of `common.exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from common.exact import DECIMALS

SHARE_BITS = 34  # a share of 1 is 2**34
STEPS = 128  # lines for each unit
NORMAL_REACH = 7  # below -7 the share is less than 2**-34 / 13
LOGISTIC_REACH = 24  # likewise at -24: 0.65 * 2**-34
PIECE = 2**14  # numbers that a CPU takes at a time: what lies between fits its cache


class Lines(NamedTuple):
    """A distribution function at multiples of 1 / STEPS from -reach to reach: whole numbers, and how much each rises to
    the next; the last one, which has none, 0."""

    values: Tensor  # float64, 2 reach STEPS + 1
    rises: Tensor
    reach: int


def lines(upper_half: Callable[[int], list[Decimal]], reach: int, device: torch.device) -> Lines:
    """upper_half: the function at n / STEPS for n from 0 to the given one; it is 1 less those below 0."""
    shares = [int((share * 2**SHARE_BITS).to_integral_value(context=DECIMALS)) for share in upper_half(reach * STEPS)]
    shares[-1] = 2**SHARE_BITS
    whole = [2**SHARE_BITS - share for share in shares[:0:-1]] + shares
    values = torch.tensor(whole, dtype=torch.float64, device=device)
    return Lines(values, torch.cat([values[1:] - values[:-1], values.new_zeros(1)]), reach)


@cache
def normal_lines(device: torch.device) -> Lines:
    return lines(normal_shares, NORMAL_REACH, device)


@cache
def logistic_lines(device: torch.device) -> Lines:
    return lines(logistic_shares, LOGISTIC_REACH, device)


def normal_shares(last: int) -> list[Decimal]:
    """1/2 + exp(-x**2 / 2) (x + x**3 / 3 + x**5 / 15 + ...) / sqrt(2 pi)."""
    root = DECIMALS.sqrt(2 * Decimal("3.14159265358979323846264338327950288419716939937510"))
    shares = []
    for n in range(last + 1):
        x = DECIMALS.divide(Decimal(n), Decimal(STEPS))
        square, term, total, odd = DECIMALS.multiply(x, x), x, x, 1
        while term > Decimal("1e-40"):
            odd += 2
            term = DECIMALS.divide(DECIMALS.multiply(term, square), Decimal(odd))
            total = DECIMALS.add(total, term)
        density = DECIMALS.divide(DECIMALS.exp(-square / 2), root)
        shares.append(DECIMALS.add(Decimal("0.5"), DECIMALS.multiply(density, total)))
    return shares


def logistic_shares(last: int) -> list[Decimal]:
    """1 / (1 + exp(-x))."""
    decays = (DECIMALS.exp(DECIMALS.divide(Decimal(-n), Decimal(STEPS))) for n in range(last + 1))
    return [DECIMALS.divide(Decimal(1), DECIMALS.add(Decimal(1), decay)) for decay in decays]


def normal(x: Tensor) -> Tensor:
    """The share of the standard normal distribution below x, in units of 2**-34, float64: see `shares_below`."""
    return shares_below(x, normal_lines(x.device))


def logistic(x: Tensor) -> Tensor:
    """Likewise of the standard logistic distribution, the sigmoid of x."""
    return shares_below(x, logistic_lines(x.device))


def shares_below(x: Tensor, of: Lines) -> Tensor:
    """Whole numbers from 0 to 2**34, those of a larger x never smaller. x: float64 of any shape, not NaN."""
    if x.numel() <= PIECE or x.device.type != "cpu":
        return piece_below(x, of)
    return torch.cat([piece_below(part, of) for part in x.flatten().split(PIECE)]).view(x.shape)


def piece_below(x: Tensor, of: Lines) -> Tensor:
    # Each operation keeps the order of what it is given, so the whole does.
    places = x.clamp(-of.reach, of.reach).add_(of.reach).mul_(STEPS)
    begun = places.floor()
    numbers = begun.long().flatten()
    part = places.sub_(begun)
    rise = of.rises.index_select(0, numbers).view(x.shape).mul_(part).floor_()
    return rise.add_(of.values.index_select(0, numbers).view(x.shape))


@cache
def normal_quantiles(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Edges and middles of 2**bits parts of the standard normal distribution with equal shares: the 2**bits - 1 inner
    edges, behind a first one of -reach that stands for none, and the median of each part. float64, 2**bits each; bits:
    up to 24."""
    values, rises, reach = normal_lines(torch.device("cpu"))
    parts = torch.arange(2**bits, dtype=torch.int64) * 2 ** (SHARE_BITS - bits)
    found = []
    for shares in (parts.double(), (parts + 2 ** (SHARE_BITS - bits - 1)).double()):
        numbers = torch.searchsorted(values, shares, right=True) - 1  # of the last line that begins at or below it
        part = (shares - values[numbers]) / rises[numbers]
        found.append(((numbers.double() + part) * (1 / STEPS) - reach).to(device))
    return found[0], found[1]
