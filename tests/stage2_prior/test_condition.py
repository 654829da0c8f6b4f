"""Conditions: what fits which prior, and the doubled batch of guidance."""

from __future__ import annotations

import pytest
import torch

from codes.spec import Grid
from common.errors import UserError
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from tests.stage2_prior.tiny import CLASSES, tiny_prior


def test_forgetting_leaves_the_null_label_and_no_text_for_some_samples():
    which = torch.tensor([False, True])
    text, mask = torch.tensor([[3, 1, -1], [2, -1, -1]]), torch.tensor([[True, False], [True, True]])
    codes, embeddings = (torch.arange(12).view(2, 2, 3),), torch.randn(2, 2, 5)
    forgotten = Condition(torch.tensor([2, 0]), codes, text, embeddings, mask).forget(which, num_classes=5)
    assert forgotten.labels.tolist() == [2, 5]
    assert forgotten.labels.dtype == torch.int64
    assert forgotten.text.tolist() == [[3, 1, -1], [-1, -1, -1]]
    assert forgotten.embedding_mask.tolist() == [[True, False], [False, False]]
    assert torch.equal(forgotten.embeddings, embeddings)
    assert torch.equal(forgotten.codes[0], codes[0])


def test_a_guided_batch_is_the_condition_and_then_what_is_left_without_label_and_text():
    prior = tiny_prior("transformer", text=TextSpec(3, 9), given=(Grid("map", 2, 3, 12),))
    condition = Condition(torch.tensor([2, 0]), (torch.arange(12).view(2, 2, 3),), torch.tensor([[3, 1, -1]] * 2))
    doubled = prior.doubled_for_guidance(condition)
    assert doubled.labels.tolist() == [2, 0, CLASSES, CLASSES]
    assert doubled.text.tolist() == [[3, 1, -1]] * 2 + [[-1, -1, -1]] * 2
    assert torch.equal(doubled.codes[0], torch.cat([*condition.codes, *condition.codes]))
    nobody = tiny_prior("transformer", num_classes=0, given=(Grid("map", 1, 2, 2),))
    with pytest.raises(UserError, match="got guidance for a prior without classes, expected guidance=1"):
        nobody.doubled_for_guidance(Condition(codes=(torch.zeros(1, 1, 2, dtype=torch.int64),)))


def test_the_null_label_and_every_class_are_in_range():
    Condition(torch.arange(4)).check_range(3)
    Condition(torch.empty(0, dtype=torch.int64)).check_range(3)
    Condition().check_range(0)


def test_a_label_beyond_the_null_label_is_not():
    with pytest.raises(UserError, match="got label 4, expected 0 to 2, or 3 for any class"):
        Condition(torch.tensor([0, 4])).check_range(3)


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


def test_every_tensor_moves():
    moved = Condition(
        torch.zeros(2), (torch.zeros(2, 1, 1),), torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3)
    ).to(torch.device("meta"))
    tensors = [moved.labels, *moved.codes, moved.text, moved.embeddings, moved.embedding_mask]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 5


def test_text_and_embeddings_are_those_that_the_prior_reads():
    text, embeddings = TextSpec(3, 10), EmbeddingSpec(2, 5)
    tokens, vectors, mask = torch.zeros(4, 3), torch.zeros(4, 2, 5), torch.ones(4, 2, dtype=torch.bool)
    Condition(text=tokens, embeddings=vectors, embedding_mask=mask).check(4, 0, (), text, embeddings)
    with pytest.raises(UserError, match=r"got no text, expected \(4, 3\): the prior was trained on captions"):
        Condition().check(4, 0, text=text)
    with pytest.raises(UserError, match=r"got text of shape \(4, 3\), expected \(5, 3\)"):
        Condition(text=tokens).check(5, 0, text=text)
    with pytest.raises(UserError, match="got text for a prior that reads none; leave it out"):
        Condition(text=tokens).check(4, 0)
    with pytest.raises(UserError, match=r"got no embedding_mask, expected \(4, 2\)"):
        Condition(embeddings=vectors).check(4, 0, embeddings=embeddings)
    with pytest.raises(UserError, match=r"got embeddings of shape \(4, 2, 5\), expected \(4, 2, 7\)"):
        Condition(embeddings=vectors, embedding_mask=mask).check(4, 0, embeddings=EmbeddingSpec(2, 7))


def test_empty_texts_are_no_specification():
    with pytest.raises(UserError, match="text vocabulary=0, expected at least 1"):
        TextSpec(3, 0)
    with pytest.raises(UserError, match="embedding width=0, expected at least 1"):
        EmbeddingSpec(3, 0)
