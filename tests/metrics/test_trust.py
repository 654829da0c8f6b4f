"""What is refused, what is labelled, and that the labels tell the truth."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from metrics import trust
from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.statistics import FeatureStatistics


@pytest.mark.parametrize(
    ("made", "reference", "width", "label"),
    [
        (500, 50_000, 2048, "singular, N=500"),
        (50_000, 500, 2048, "singular, N=500"),
        (2048, 50_000, 2048, "singular, N=2048"),
        (2049, 50_000, 2048, "biased, N=2049"),
        (500, 50_000, 64, "biased, N=500"),
        (500, 0, 64, "biased, N=500"),
        (50_000, 50_000, 2048, ""),
        (50_000, 0, 2048, ""),
    ],
)
def test_a_frechet_distance_of_few_images_says_so(made: int, reference: int, width: int, label: str):
    worth = trust.frechet(made, reference, width)
    assert worth.label == label
    assert bool(worth) == bool(label) == bool(worth.reason)


@pytest.mark.parametrize(("made", "reference"), [(1, 100), (0, 0), (100, 1)])
def test_a_frechet_distance_of_no_covariance_is_refused(made: int, reference: int):
    with pytest.raises(UserError, match="expected at least 2"):
        trust.frechet(made, reference, 64)


def test_the_label_is_true():
    """500 images of the reference's own distribution are at a distance that 20,000 are not."""
    torch.manual_seed(0)
    reference = FeatureStatistics.of(torch.randn(20_000, 96))
    few, many = (frechet_distance(reference, FeatureStatistics.of(torch.randn(n, 96))) for n in (500, 20_000))
    assert trust.frechet(500, 20_000, 96).label == "biased, N=500"
    assert few > 10 * many


def test_a_kernel_distance_is_fine_but_for_its_deviation():
    assert trust.kernel(500, 50_000, 100) == trust.FINE
    assert trust.kernel(500, 50_000, 400).label == "overlapping subsets, N=500"
    with pytest.raises(UserError, match="subset size of 2 to 500, or more images"):
        trust.kernel(500, 50_000, 1000)


def test_an_inception_score_of_few_images_a_class_is_too_low():
    assert trust.inception_score(50_000, 10, 1008) == trust.FINE
    assert trust.inception_score(5_000, 10, 1008).label == "biased, 500 images a split"
    torch.manual_seed(0)
    sure = torch.eye(100)[torch.randint(100, (20_000,))]
    assert trust.inception_score(500, 10, 100)
    assert inception_score(sure[:500]).mean < 0.5 * inception_score(sure).mean


def test_balls_among_few_or_unequal_sets_are_labelled():
    assert trust.manifolds(50_000, 50_000, 3) == trust.FINE
    assert trust.manifolds(10_000, 10_000, 3).label == "N=10000"
    assert trust.manifolds(10_000, 50_000, 3).label == "unequal sets, N=10000 and 50000"
    with pytest.raises(UserError, match="balls to the neighbour 5 of 5 images"):
        trust.manifolds(5, 100, 5)


def test_features_of_another_treatment_are_refused():
    one = {"network": "timm:a", "fingerprint": "1", "resize": "224x224"}
    trust.check_comparable(one, dict(one))
    with pytest.raises(UserError, match=r"another network or treatment \(resize: 224x224 and 299x299\)"):
        trust.check_comparable(one, {**one, "fingerprint": "2", "resize": "299x299"})
    with pytest.raises(UserError, match="their weights differ"):
        trust.check_comparable(one, {**one, "fingerprint": "2"})
