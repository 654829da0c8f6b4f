"""Mode prior of version 1: files of the build before are read (tests/test_earlier_builds.py), in batches of lanes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipelines.codec.float_prior import in_lanes, weights_for


@given(st.lists(st.integers(0, 3), max_size=20))
@settings(deadline=None)
def test_batches_hold_each_item_once_and_each_lane_at_most_once(lanes):
    batches = in_lanes(range(len(lanes)), lambda i: lanes[i])
    assert sorted(item for batch in batches for item in batch) == list(range(len(lanes)))
    for batch in batches:
        assert len({lanes[i] for i in batch}) == len(batch)
    assert len(batches) == max((lanes.count(lane) for lane in set(lanes)), default=0)


def test_every_value_of_every_code_keeps_a_count():
    weights = weights_for(torch.tensor([[[0.0, -1e4, 50.0], [1.0, 1.0, 1.0]]]))
    assert weights.shape == (1, 2, 3)
    assert weights.min() >= 0
    assert (weights.sum(axis=2) == 2**24 - 3).all()


def test_logits_that_are_not_finite_are_told():
    with pytest.raises(UserError, match="the prior's logits are not finite: its weights are damaged; take an earlier"):
        weights_for(torch.tensor([[[0.0, float("nan")]]]))
