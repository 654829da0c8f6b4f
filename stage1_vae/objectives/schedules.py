"""Weights of a loss as functions of the step alone."""

from __future__ import annotations


def linear_rise(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps` and from then on."""
    if step >= steps:
        return end
    return start + (end - start) * step / steps


def cyclical_rise(step: int, start: float, steps: int, cycles: int, rising_share: float) -> float:
    """`cycles` cycles over `steps` steps, each of which rises from `start` to 1 over its first `rising_share` and stays
    there for the rest; 1 after the last (Fu et al. 2019, "Cyclical Annealing Schedule", arXiv:1903.10145, equation 6).
    """
    if step >= steps:
        return 1.0
    place = (step * cycles % steps) / steps  # in the cycle, from 0 to below 1; whole numbers until the division
    return 1.0 if place >= rising_share else start + (1 - start) * place / rising_share
