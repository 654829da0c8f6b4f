"""Kernel distance of two sets of features, unbiased whatever their number (Binkowski et al. 2018, arXiv:1801.01401;
with Inception's features it is KID)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from metrics.statistics import check_finite, in_float64

ROWS = 256  # of a kernel matrix that are in memory at a time, and squares of which each is computed once


class KernelDistance(NamedTuple):
    mean: float  # over subsets
    std: float  # over subsets; not the error of the mean: subsets share images


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Mean over subsets of the unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)**3. It may fall
    below 0 where the sets are alike.

    x, y: n d and m d; subset_size: of each set, drawn without repetition, anew for each subset. The same seed draws the
    same subsets as in torch-fidelity, whose defaults these are. Raises UserError where a set has fewer features than a
    subset: a smaller one changes the deviation, not what the mean estimates.
    """
    check(x, y)
    if subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise UserError(
            f"{subsets} subsets of {subset_size} features from sets of {len(x)} and {len(y)}, expected at least one "
            f"subset, of 2 to {min(len(x), len(y))}; give a smaller subset size, or more images"
        )
    draws = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        one = in_float64(x[torch.from_numpy(draws.choice(len(x), subset_size, replace=False)).to(x.device)])
        other = in_float64(y[torch.from_numpy(draws.choice(len(y), subset_size, replace=False)).to(y.device)])
        values.append(discrepancy(one, other))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def kernel_distance_of_all(x: Tensor, y: Tensor) -> float:
    """The same from all pairs of the sets, n d and m d: no subsets, no seed, and of all unbiased estimates from these
    features the one that varies least. It takes n * n * d steps. Raises UserError."""
    check(x, y)
    return discrepancy(in_float64(x), in_float64(y))


def discrepancy(x: Tensor, y: Tensor) -> float:
    """Unbiased, of float64 features n d and m d."""
    n, m = len(x), len(y)
    within = sum_of_pairs(x) / (n * (n - 1)) + sum_of_pairs(y) / (m * (m - 1))
    between = sum(float(kernel(rows, y).sum()) for rows in x.split(ROWS))
    return within - 2 * between / (n * m)


def sum_of_pairs(x: Tensor) -> float:
    """Of the kernel over all ordered pairs of different rows. Each pair is computed once."""
    total = 0.0
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        own = kernel(rows, rows)
        total += float(own.sum() - own.diagonal().sum())
        if start + ROWS < len(x):
            total += 2 * sum(float(kernel(rows, others).sum()) for others in x[start + ROWS :].split(ROWS))
    return total


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """n d, m d -> n m"""
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


def check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise UserError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (n, d) and (m, d) of one network, "
            "two at least of each"
        )
    check_finite(x, y)
