"""Frechet distance of two sets of features, each taken for a Gaussian (Dowson and Landau 1982; as a judgement of
generators: Heusel et al. 2017, arXiv:1706.08500; with Inception's features it is FID)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError
from metrics.statistics import FeatureStatistics

BLOCK = 256  # columns of a triangular matrix that are multiplied at a time
RESOLVED = 1e-14  # of the largest eigenvalue: below it, what is left of one is rounding


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|**2 + tr(A + B - 2 (A B)**(1/2)) of the covariances A and B; 0 for equal statistics.

    Raises UserError for features of different widths and for fewer than two of them.
    """
    if a.width != b.width:
        raise UserError(f"features of width {a.width} and of width {b.width} cannot be compared: use one network")
    device = a.mean.device
    away = a.mean - b.mean.to(device)
    first, second = a.deviations(), b.deviations()
    if first is None and second is None:
        A, B = a.covariance, b.covariance.to(device)
        traces, common = A.trace() + B.trace(), trace_of_root(A, B)
    else:
        first = factor(a.covariance) if first is None else first
        second = (factor(b.covariance) if second is None else second).to(device)
        traces, common = first.square().sum() + second.square().sum(), nuclear(first, second)
    return max(0.0, float(away.square().sum() + traces - 2 * common))


def trace_of_root(A: Tensor, B: Tensor) -> Tensor:  # noqa: N803
    """tr (A B)**(1/2) of covariances d d, float64.

    The eigenvalues of AB are those of L'BL with A = LL' (Cholesky), which is symmetric: a fifth of the steps that AB
    itself would take, and no complex numbers. Where some cannot be told from 0, and their roots would be those of
    rounding errors, the covariances are singular and `nuclear` takes over.
    """
    triangle, failed = torch.linalg.cholesky_ex(A)
    if not failed:
        eigenvalues = torch.linalg.eigvalsh(congruent(triangle, B))
        if eigenvalues[0] > RESOLVED * eigenvalues[-1]:
            return eigenvalues.sqrt().sum()
    return nuclear(factor(A), factor(B))


def congruent(triangle: Tensor, matrix: Tensor) -> Tensor:
    """The lower half of L'BL for a lower triangular L and a symmetric B, d d each. Multiplied in blocks that leave out
    the zeros and the upper half, it takes half the time of two products."""
    right, result = torch.empty_like(matrix), torch.zeros_like(matrix)
    for start in range(0, len(matrix), BLOCK):
        here = slice(start, start + BLOCK)
        torch.mm(matrix[:, start:], triangle[start:, here], out=right[:, here])
    for start in range(0, len(matrix), BLOCK):
        here, end = slice(start, start + BLOCK), start + BLOCK
        result[here, :end] = triangle[start:, here].T @ right[start:, :end]
    return result


def nuclear(first: Tensor, second: Tensor) -> Tensor:
    """tr (F'F G'G)**(1/2) of factors n d and m d: the sum of the singular values of FG', n m. It is exact to rounding
    for singular covariances too, as are those of fewer features than dimensions, which are their own factors."""
    return torch.linalg.svdvals(first @ second.T).sum()


def factor(covariance: Tensor) -> Tensor:
    """F, r d, float64, with F'F the covariance, r its rank."""
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return triangle.T
    # Singular: a feature that never changes, or an imported covariance of few images.
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return (vectors[:, kept] * values[kept].sqrt()).T
