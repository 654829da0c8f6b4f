"""Frechet distance of two sets of features, each taken for a Gaussian (Dowson and Landau 1982; as a judgement of
generators: Heusel et al. 2017, arXiv:1706.08500; with Inception's features it is FID)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError
from metrics.statistics import FeatureStatistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|**2 + tr(A + B - 2 (A B)**(1/2)) of the covariances A and B; 0 for equal statistics.

    With A = F'F and B = G'G, the trace of the root is the sum of the singular values of FG', whatever the factors. They
    are Cholesky's, or, where there are no more features than dimensions, the features themselves: then the matrix is
    only as large as there are features. No root is taken of a rounding error, as it is of an eigenvalue of AB that
    should be 0, so that singular covariances are nothing special: the error is some 1e-13 of the traces.

    Raises UserError for features of different widths and for fewer than two of them.
    """
    if a.width != b.width:
        raise UserError(f"features of width {a.width} and of width {b.width} cannot be compared: use one network")
    away = a.mean - b.mean.to(a.mean.device)
    first, second = factor(a), factor(b).to(a.mean.device)
    common = torch.linalg.svdvals(first @ second.T).sum()
    return max(0.0, float(away.square().sum() + first.square().sum() + second.square().sum() - 2 * common))


def factor(statistics: FeatureStatistics) -> Tensor:
    """F, r d, float64, with F'F the covariance."""
    rows = statistics.deviations()
    if rows is not None:
        return rows
    covariance = statistics.covariance
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return triangle.T
    # Singular: a feature that never changes, or an imported covariance of few images.
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return (vectors[:, kept] * values[kept].sqrt()).T
