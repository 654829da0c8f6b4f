"""The Frechet distance: analytic answers, torch-fidelity's, and covariances that have no root."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from metrics.frechet import frechet_distance
from metrics.statistics import FeatureStatistics


def gaussian(count: int, mean: Tensor, root: Tensor) -> Tensor:
    """Rows, n d, whose mean and covariance root' root are exact to rounding."""
    rows = torch.randn(count, len(mean), dtype=torch.float64)
    rows = rows - rows.mean(dim=0)
    q, _ = torch.linalg.qr(rows)
    return q * math.sqrt(count - 1) @ root + mean


def theirs(a: Tensor, b: Tensor) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    first, second = fid_features_to_statistics(a), fid_features_to_statistics(b)
    return fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize("count", [60, 61, 500])
def test_gaussians_along_the_same_axes_have_the_analytic_distance(count: int):
    """|m|**2 and the squared differences of the deviations."""
    d = 24
    turn, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    one, other = torch.rand(d).double() + 0.1, torch.rand(d).double() * 3
    mean = torch.randn(d).double()
    a = FeatureStatistics.of(gaussian(count, torch.zeros(d).double(), one.diag() @ turn))
    b = FeatureStatistics.of(gaussian(count + 5, mean, other.diag() @ turn))
    expected = float(mean.square().sum() + (one - other).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_gaussians_of_two_dimensions_have_the_analytic_distance_along_any_axes():
    """For 2x2 matrices tr (AB)**(1/2) = (tr AB + 2 (det AB)**(1/2))**(1/2)."""
    a, b = (gaussian(40, torch.zeros(2).double(), torch.randn(2, 2).double()) for _ in range(2))
    first, second = FeatureStatistics.of(a), FeatureStatistics.of(b)
    product = first.covariance @ second.covariance
    root = torch.sqrt(product.trace() + 2 * torch.linalg.det(product).sqrt())
    expected = float(first.covariance.trace() + second.covariance.trace() - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_it_is_that_of_torch_fidelity():
    mix = torch.randn(32, 32)
    a, b = torch.randn(400, 32) @ mix, torch.randn(300, 32) @ (mix + 0.2 * torch.randn(32, 32)) + 0.3
    first, second = FeatureStatistics.of(a), FeatureStatistics.of(b)
    assert frechet_distance(first, second) == pytest.approx(theirs(a.double(), b.double()), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(10, 12), (10, 400), (400, 10), (50, 51)])
def test_few_features_have_the_distance_of_their_singular_covariances(n: int, m: int):
    """Covariances of fewer features than dimensions have no inverse and many roots of 0."""
    a, b = torch.randn(n, 50).double(), torch.randn(m, 50).double() * 2 + 0.5
    first, second = FeatureStatistics.of(a), FeatureStatistics.of(b)
    expected = theirs(a, b)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    # The same from the covariances alone, as a file gives them.
    moments = [FeatureStatistics.from_moments(s.mean, s.covariance, s.count) for s in (first, second)]
    assert frechet_distance(*moments) == pytest.approx(frechet_distance(first, second), rel=1e-7)


def test_equal_sets_have_distance_zero_and_a_shift_its_square():
    """Also where a feature never changes and two are copies: their covariance is singular, and eigenvalues of a product
    that should be 0 have roots of 1e-8."""
    features = torch.randn(300, 40).double()
    features[:, 3], features[:, 7] = 5.0, features[:, 8]
    first = FeatureStatistics.of(features)
    again = FeatureStatistics.of(features.flip(0))
    assert frechet_distance(first, again) == pytest.approx(0, abs=1e-10)
    shifted = FeatureStatistics.of(features + 0.25)
    assert frechet_distance(first, shifted) == pytest.approx(40 * 0.25**2, rel=1e-10)


def test_features_that_are_all_the_same_differ_by_their_means():
    a, b = FeatureStatistics.of(torch.zeros(100, 8)), FeatureStatistics.of(torch.ones(9, 8) * 2)
    assert frechet_distance(a, b) == pytest.approx(32)
    spread = FeatureStatistics.of(gaussian(50, torch.zeros(8).double(), torch.eye(8).double()))
    assert frechet_distance(a, spread) == pytest.approx(8)


def test_different_networks_and_single_images_are_refused():
    with pytest.raises(UserError, match="features of width 4 and of width 5 cannot be compared"):
        frechet_distance(FeatureStatistics.of(torch.ones(9, 4)), FeatureStatistics.of(torch.ones(9, 5)))
    with pytest.raises(UserError, match="expected two at least"):
        frechet_distance(FeatureStatistics.of(torch.ones(9, 4)), FeatureStatistics.of(torch.ones(1, 4)))


def test_more_samples_of_one_distribution_come_nearer():
    """The bias of small sets: the reason for counts beside every number."""
    torch.manual_seed(0)
    reference = FeatureStatistics.of(torch.randn(20000, 64))
    found = [frechet_distance(reference, FeatureStatistics.of(torch.randn(n, 64))) for n in (100, 1000, 10000)]
    assert found[0] > 5 * found[1] > 20 * found[2] > 0
    assert np.isfinite(found).all()
