"""Mode prior of version 1: files of the build before are read (tests/test_earlier_builds.py), in batches of lanes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.codec.codec as codec_module
from common.errors import UserError
from pipelines.codec.archive import read_archive
from pipelines.codec.float_prior import in_lanes, weights_for
from pipelines.codec.prior_coding import decode_with_prior
from tests.pipelines.conftest import make_pipeline, some_images


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


def test_a_batch_of_lanes_is_walked_once_however_few_images_fit_at_once(monkeypatch):
    codec = make_pipeline().codec()
    archive = read_archive(codec.compress(some_images(3), "prior").data)
    entries = [entry._replace(lane=lane) for lane, entry in enumerate(archive.entries)]
    walked = []

    def decode(prior, chosen, lanes):
        walked.append([entry.lane for entry in chosen])
        return decode_with_prior(prior, [entry.payload for entry in chosen], [entry.label for entry in chosen])

    monkeypatch.setattr(codec_module, "images_at_once", lambda prior: 1)
    monkeypatch.setattr(codec_module.float_prior, "decode", decode)
    old = archive._replace(version=1, lanes=3, environment=codec.environment)
    specs = {entry.shape: codec.spec_of(16, 16) for entry in entries}
    assert len(codec.codes_of(dict(enumerate(entries)), old, specs, ["a.zlg"] * 3)) == 3
    assert walked == [[0, 1, 2]]
