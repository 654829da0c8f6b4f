"""Modified Bessel functions of the first kind, on a logarithmic scale and in float64, at any order and argument."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

DEBYE_ORDER = 60.0  # from here on, the expansion of `log_uniform` is exact in float64
DEBYE_TERMS = 10


def log_bessel_and_ratio(order: float, argument: Tensor) -> tuple[Tensor, Tensor]:
    """log(I_v(x) x^-v e^-x) and I_(v+1)(x) / (x I_v(x)) of an order v >= 0 and of any arguments x >= 0, as float64.

    Both are finite at x = 0, and have the right derivatives in x by autograd. scipy's `ive`, of which the first is the
    log, underflows where v is large beside x. From a high order, where Debye's expansion holds, t_v = I_(v+1) / (x I_v)
    comes down by t_(v-1) = 1 / (2 v + x^2 t_v), all of whose terms are positive, so that nothing cancels.
    """
    x = argument.double()
    steps = max(0, math.ceil(DEBYE_ORDER - order))
    log_bessel = log_uniform(order + steps, x)
    ratio = (log_uniform(order + steps + 1, x) - log_bessel).exp()
    for step in range(steps, 0, -1):
        ratio = 1 / (2 * (order + step) + x.square() * ratio)
        log_bessel = log_bessel - ratio.log()
    return log_bessel, ratio


def log_uniform(order: float, x: Tensor) -> Tensor:
    """log(I_v(x) x^-v e^-x) by Debye's expansion for large orders v, which is uniform in x (NIST's Digital Library of
    Mathematical Functions, 10.41.3), so written that nothing cancels."""
    root = (order * order + x.square()).sqrt()
    p = order / root
    series = torch.zeros_like(x)
    for k in reversed(range(DEBYE_TERMS + 1)):
        series = series / order + polynomial(DEBYE[k], p)
    exponent = order * order / (root + x) - order * (order + root).log()
    return exponent - 0.5 * (2 * math.pi * root).log() + series.log()


def polynomial(coefficients: list[float], p: Tensor) -> Tensor:
    """Coefficients from that of p^0 on."""
    value = torch.zeros_like(p)
    for coefficient in reversed(coefficients):
        value = value * p + coefficient
    return value


def debye_polynomials(count: int) -> list[list[float]]:
    """U_0, ..., U_count by U_(k+1)(p) = p^2 (1 - p^2) U_k'(p) / 2 + int_0^p (1 - 5 t^2) U_k(t) dt / 8 (10.41.9)."""
    polynomials = [[Fraction(1)]]
    for _ in range(count):
        u = polynomials[-1]
        following = [Fraction(0)] * (len(u) + 3)
        for power, c in enumerate(u):
            following[power + 1] += c * (Fraction(power, 2) + Fraction(1, 8 * (power + 1)))
            following[power + 3] -= c * (Fraction(power, 2) + Fraction(5, 8 * (power + 3)))
        polynomials.append(following)
    return [[float(c) for c in u] for u in polynomials]


DEBYE = debye_polynomials(DEBYE_TERMS)
