"""The inception score: torch-fidelity's numbers, analytic answers, and the trap of the order."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from metrics.inception_score import inception_score


@pytest.mark.parametrize(("splits", "seed"), [(10, 2020), (3, 7), (1, 2020)])
def test_it_is_that_of_torch_fidelity_with_the_same_seed(splits: int, seed: int):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(103, 12) * 4
    theirs = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed)
    found = inception_score(logits.softmax(dim=1), splits, seed)
    assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert found.std == pytest.approx(theirs["inception_score_std"], rel=1e-5, abs=1e-12)


def test_sure_images_of_all_classes_have_their_number_and_unsure_ones_have_one():
    sure = torch.eye(10).repeat(50, 1)  # with probabilities of exactly 0
    assert inception_score(sure, splits=1).mean == pytest.approx(10)
    assert inception_score(torch.full((200, 10), 0.1), splits=5) == pytest.approx((1, 0), abs=1e-6)


def test_the_order_of_the_images_does_not_matter():
    """In the order of their classes each of ten splits would hold one class, and the score would be 1."""
    by_class = torch.eye(10).repeat_interleave(100, dim=0)
    assert inception_score(by_class, splits=10).mean > 9
    parts = by_class.split(100)
    assert all(inception_score(part, splits=1).mean == pytest.approx(1) for part in parts)


@pytest.mark.parametrize(
    ("probabilities", "splits", "message"),
    [
        (torch.full((5, 4), 0.25), 10, r"in 10 splits, expected \(images, classes\) and 1 to 5 splits"),
        (torch.full((5, 4), 0.25), 0, "in 0 splits"),
        (torch.randn(20, 4), 2, "these are no probabilities"),
        (torch.full((20, 4), torch.nan), 2, "these are no probabilities"),
    ],
)
def test_what_cannot_be_scored_is_refused(probabilities: torch.Tensor, splits: int, message: str):
    with pytest.raises(UserError, match=message):
        inception_score(probabilities, splits)
