"""Random numbers that are a function of a seed and a number alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def uniforms(seed: int, draws: Sequence[int], count: int) -> np.ndarray:
    """Random numbers in [0, 1), float64 b count, a function of the seed and each draw's number alone.

    SplitMix64 (Steele, Lea and Flood 2014) used as a counter-based generator: one call serves a whole batch,
    where a generator object for each draw would take longer than cutting out the image.
    """

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    start = mix(np.array([seed % 2**64], dtype=np.uint64) * step)
    first = np.asarray(draws, dtype=np.uint64)[:, None] * np.uint64(count)
    places = first + np.arange(1, count + 1, dtype=np.uint64)  # b count
    return (mix(start + places * step) >> np.uint64(11)) * 2.0**-53
