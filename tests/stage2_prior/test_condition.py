"""Conditions: what fits which prior, and the doubled batch of guidance."""

from __future__ import annotations

import pytest
import torch

from stage1_vq.codes import Grid
from stage2_prior.condition import Condition
from training.errors import UserError


def test_doubled_for_guidance_appends_the_null_label():
    doubled = Condition(torch.tensor([2, 0, 1])).doubled_for_guidance(num_classes=5)
    assert doubled.labels is not None
    assert doubled.labels.tolist() == [2, 0, 1, 5, 5, 5]
    assert doubled.labels.dtype == torch.int64


def test_the_null_label_and_every_class_are_in_range():
    Condition(torch.arange(4)).check_range(3)
    Condition(torch.empty(0, dtype=torch.int64)).check_range(3)
    Condition().check_range(0)


def test_a_label_beyond_the_null_label_is_not():
    with pytest.raises(UserError, match="got label 4, expected 0 to 2, or 3 for any class"):
        Condition(torch.tensor([0, 4])).check_range(3)


def test_given_codes_are_those_of_both_halves_of_a_guided_batch():
    codes = torch.arange(12).view(2, 2, 3)
    doubled = Condition(torch.tensor([0, 1]), (codes,)).doubled_for_guidance(num_classes=3)
    assert doubled.codes is not None
    assert torch.equal(doubled.codes[0], torch.cat([codes, codes]))


def test_given_codes_are_those_of_the_grids_that_the_prior_goes_by():
    grid = Grid("top", 2, 3, 8)
    Condition(None, (torch.zeros(4, 2, 3, dtype=torch.int64),)).check(4, 0, (grid,))
    with pytest.raises(UserError, match=r"got given codes of shapes \[\], expected \[\(4, 2, 3\)\]"):
        Condition().check(4, 0, (grid,))
    with pytest.raises(UserError, match=r"got given codes of shapes \[\(4, 3, 2\)\], expected \[\(4, 2, 3\)\]"):
        Condition(None, (torch.zeros(4, 3, 2, dtype=torch.int64),)).check(4, 0, (grid,))
    with pytest.raises(UserError, match=r"got given codes of shapes .*, expected \[\]"):
        Condition(None, (torch.zeros(4, 2, 3, dtype=torch.int64),)).check(4, 0)


def test_labels_of_a_prior_without_classes_are_refused():
    with pytest.raises(UserError, match="got labels for a prior without classes, expected none; leave the labels out"):
        Condition(torch.tensor([0])).check(1, num_classes=0)
