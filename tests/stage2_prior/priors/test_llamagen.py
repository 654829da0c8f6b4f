"""The properties of LlamaGen's transformer that not all priors share; the others are in test_conformance.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.priors.llamagen import LlamaGen, LlamaGenConfig, place_turns, turn
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import walk
from tests.stage2_prior.tiny import random_codes, tiny_spec

CONFIG = LlamaGenConfig(layers=2, width=24, heads=3, hidden_width=32)
CAPTION = EmbeddingSpec(6, 5)


def llamagen(num_classes: int = 0, **facts: Any) -> LlamaGen:
    torch.manual_seed(0)
    prior = LlamaGen(CONFIG, tiny_spec(3, 4), num_classes, **facts)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return prior.eval()


def captions(batch: int) -> Condition:
    """Padded at the left, as the published models have it: the first is full, the next has one vector less, and so on,
    and each seventh has none."""
    vectors = torch.randn(batch, 6, 5, generator=torch.Generator().manual_seed(2))
    padding = torch.arange(batch) % 7
    return Condition(embeddings=vectors, embedding_mask=torch.arange(6) >= padding[:, None])


def stepped(prior: LlamaGen, codes: Tensor, condition: Condition) -> Tensor:
    """Logits `b n k` of a stepper that is led along the codes, b h w."""
    flat, seen = codes.flatten(1), []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return flat[:, position : position + 1]

    walk(prior.stepper(len(codes), condition), flat.shape[1], choose)
    return torch.cat(seen, dim=1)


def test_scores_depend_on_how_many_rows_and_columns_two_codes_are_apart():
    grid = Grid("codes", 4, 5, 8)
    turns = place_turns(grid, 2, 16, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16)
    scores = (turn(q.expand(-1, -1, 22, -1), turns) @ turn(k.expand(-1, -1, 22, -1), turns).mT)[0, 0]
    assert (scores[:2] == 0).all()  # what comes before the codes has no position
    assert (scores[:, :2] == 0).all()
    scores = scores[2:, 2:].view(4, 5, 4, 5)  # row, column, row, column
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=0, atol=1e-5)
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3  # a row is no column


@pytest.mark.parametrize(("width", "heads", "hidden"), [(768, 12, 2048), (1024, 16, 2816), (3200, 32, 8704)])
def test_the_hidden_width_is_eight_thirds_up_to_a_multiple_of_256(width, heads, hidden):
    assert LlamaGenConfig(width=width, heads=heads).hidden == hidden


@torch.no_grad()
def test_stepper_agrees_with_the_teacher_forced_pass_given_captions():
    prior, condition = llamagen(embeddings=CAPTION), captions(9)
    (codes,) = random_codes(9, prior)
    logits = prior.logits((codes,), condition)
    assert logits.std() > 0.1
    torch.testing.assert_close(stepped(prior, codes, condition), logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_vectors_that_count_are_seen_and_padding_is_not():
    prior, condition = llamagen(embeddings=CAPTION), captions(6)
    (codes,) = random_codes(6, prior)
    logits = prior.logits((codes,), condition)
    assert condition.embeddings is not None
    assert condition.embedding_mask is not None
    for place in range(6):
        other = condition.embeddings.clone()
        other[:, place] += 1
        change = (prior.logits((codes,), replace(condition, embeddings=other)) - logits).abs().amax(-1)  # b n
        counts = condition.embedding_mask[:, place]
        assert (change[counts] > 1e-5).all()
        assert (change[~counts] == 0).all()


@torch.no_grad()
def test_a_caption_of_which_nothing_counts_and_one_of_zeros_are_any_text():
    prior, condition = llamagen(embeddings=CAPTION), captions(2)
    (codes,) = random_codes(2, prior)
    everything, nothing = (torch.full((2, 6), value) for value in (True, False))
    assert condition.embeddings is not None
    unmasked = prior.logits((codes,), Condition(embeddings=condition.embeddings, embedding_mask=nothing))
    zeros = Condition(embeddings=torch.zeros(2, 6, 5), embedding_mask=everything)
    assert torch.equal(prior.logits((codes,), zeros), unmasked)
    null = prior.caption.null.expand(2, -1, -1)
    torch.testing.assert_close(
        prior.logits((codes,), Condition(embeddings=null, embedding_mask=everything)), unmasked, rtol=0, atol=1e-6
    )


def test_guidance_by_captions_follows_its_formula_and_keeps_their_length():
    prior, condition = llamagen(embeddings=CAPTION), captions(6)
    settings = SamplingConfig(temperature=0, guidance=3.0)
    drawn = sample_codes(prior, range(6), condition, 0, settings)[0].flatten(1)
    no_text = replace(condition, embeddings=torch.zeros(6, 6, 5))
    codes = torch.zeros(6, 12, dtype=torch.int64)
    for position in range(12):
        with torch.no_grad():
            text, null = (prior.logits((codes.view(6, 3, 4),), c)[:, position] for c in (condition, no_text))
        codes[:, position] = (null + 3 * (text - null)).argmax(-1)
    assert torch.equal(drawn, codes)
    plain = sample_codes(prior, range(6), condition, 0, replace(settings, guidance=1.0))[0].flatten(1)
    assert not torch.equal(drawn, plain)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_of_a_caption_does_not_depend_on_its_batch(guidance):
    prior, condition = llamagen(embeddings=CAPTION), captions(16)
    settings = SamplingConfig(top_k=8, guidance=guidance)
    together = sample_codes(prior, range(16), condition, 3, settings)[0]
    alone = [
        sample_codes(prior, [i], condition.map(lambda tensor, i=i: tensor[i : i + 1]), 3, settings)[0]
        for i in range(16)
    ]
    assert torch.equal(torch.cat(alone), together)
    assert len(together.flatten(1).unique(dim=0)) == 16


def test_a_prior_of_captions_is_saved_and_loaded(tmp_path):
    prior, condition = llamagen(embeddings=CAPTION), captions(3)
    prior.save_pretrained(tmp_path / "prior")
    loaded = load_pretrained(tmp_path / "prior", {"llamagen": LlamaGen})
    assert loaded.embeddings == CAPTION
    codes = random_codes(3, prior)
    assert torch.equal(loaded.nll(codes, condition), prior.nll(codes, condition))


@pytest.mark.parametrize("dropout", ["dropout", "residual_dropout"])
@torch.no_grad()
def test_dropout_is_for_training_only(dropout):
    torch.manual_seed(0)
    prior = LlamaGen(replace(CONFIG, **{dropout: 0.5}), tiny_spec(3, 4), 0)
    torch.nn.init.normal_(prior.output.weight)
    codes = random_codes(2, prior)
    assert not torch.equal(prior.logits(codes, Condition()), prior.logits(codes, Condition()))
    prior.eval()
    assert torch.equal(prior.logits(codes, Condition()), prior.logits(codes, Condition()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"heads": 0}, "heads=0, expected at least 1"),
        ({"heads": 5}, "width=24 with heads=5, expected a width that is a multiple of 20"),
        ({"hidden_width": 0}, "hidden_width=0, expected at least 1; leave it out for 8/3 of the width"),
        ({"residual_dropout": 1.0}, r"residual_dropout=1.0, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **setting)


@pytest.mark.parametrize(
    ("num_classes", "facts"),
    [(0, {"text": TextSpec(4, 100)}), (3, {"embeddings": CAPTION})],
    ids=["tokens of a text", "classes and a text"],
)
def test_what_it_cannot_go_by_is_refused(num_classes, facts):
    with pytest.raises(UserError, match="a llamagen prior goes by classes or by embeddings of captions, expected one"):
        llamagen(num_classes, **facts)


def test_captions_are_given_exactly_to_a_prior_of_captions():
    with pytest.raises(UserError, match=r"got no embeddings, expected \(2, 6, 5\)"):
        llamagen(embeddings=CAPTION).stepper(2, Condition())
    with pytest.raises(UserError, match="got embeddings for a prior that reads none"):
        llamagen().stepper(2, captions(2))


def test_codes_of_several_grids_are_refused():
    with pytest.raises(UserError, match="expected one grid: a llamagen prior models one"):
        LlamaGen(CONFIG, CodeSpec((Grid("a", 1, 1, 4), Grid("b", 2, 2, 4)), 8, 8), 0)
