"""What a transformer reads before the codes: captions, embeddings and given codes. The properties that all priors owe,
of a prior that reads all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from codes.spec import Grid
from common.errors import UserError
from common.model_io import load_pretrained
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.priors import PRIORS, Transformer
from stage2_prior.priors.transformer_layers import TransformerConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.test_conformance import joined, step_through
from tests.stage2_prior.tiny import CLASSES, TINY, random_codes, tiny_prior, tiny_spec

GIVEN = (Grid("map", 2, 3, 6), Grid("depth", 4, 5, 9))
TEXT, EMBEDDINGS = TextSpec(4, 13), EmbeddingSpec(2, 7)
READS = {
    "given": {"given": GIVEN},
    "text": {"text": TEXT},
    "embeddings": {"embeddings": EMBEDDINGS},
    "all": {"given": GIVEN, "text": TEXT, "embeddings": EMBEDDINGS},
}
EVERY_PREFIX = pytest.mark.parametrize("reads", READS)


def prior_that(reads: str, num_classes: int = CLASSES) -> Transformer:
    prior = tiny_prior("transformer", num_classes, **READS[reads])
    assert isinstance(prior, Transformer)
    return prior


def condition_of(batch: int, prior: Transformer, seed: int = 1) -> Condition:
    """Captions of every length from none to the longest, and all but the first embeddings of some."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(TEXT.vocabulary, (batch, TEXT.length), generator=generator)
    ended = torch.arange(TEXT.length) >= torch.arange(batch)[:, None] % (TEXT.length + 1)
    mask = torch.arange(EMBEDDINGS.length) <= torch.arange(batch)[:, None] % EMBEDDINGS.length
    vectors = torch.randn(batch, EMBEDDINGS.length, EMBEDDINGS.width, generator=generator)
    return Condition(
        torch.arange(batch) % (CLASSES + 1) if prior.num_classes else None,
        tuple(torch.randint(g.vocabulary, (batch, g.height, g.width), generator=generator) for g in prior.given)
        or None,
        text.masked_fill(ended, -1) if prior.text else None,
        vectors if prior.embeddings else None,
        mask if prior.embeddings else None,
    )


@EVERY_PREFIX
@pytest.mark.parametrize("num_classes", [0, CLASSES])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_stepper_agrees_with_the_teacher_forced_pass(reads, num_classes, autocast):
    prior = prior_that(reads, num_classes)
    codes, condition = random_codes(6, prior), condition_of(6, prior)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = prior.logits(codes, condition).float()
        stepped = joined(step_through(prior, codes, condition))
    assert stepped.shape == expected.shape == (6, 15, 11)
    if autocast:  # bfloat16 knows three digits
        assert (stepped - expected).square().mean().sqrt() < 0.03 * expected.std()
    else:
        torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-5)


@EVERY_PREFIX
def test_a_code_never_sees_itself_or_later_ones_and_sees_all_of_the_prefix(reads):
    prior = prior_that(reads)
    codes, condition = random_codes(5, prior), condition_of(5, prior)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
        for position in range(15):
            other = codes[0].clone().flatten(1)
            other[:, position] = (other[:, position] + 1) % 11
            change = (expected - prior.logits((other.view(5, 3, 5),), condition)).abs().amax(dim=(0, 2))
            assert (change[: position + 1] == 0).all()
            assert (change[position + 1 :] > 0).all()
        for changed in changes_of(condition):
            assert ((expected - prior.logits(codes, changed)).abs().amax(dim=(0, 2)) > 1e-5).all()


def changes_of(condition: Condition) -> list[Condition]:
    """A condition for each thing in it, with that changed for some sample: each token, vector and given code."""
    found = []
    if condition.text is not None:
        for place in range(TEXT.length):
            text = condition.text.clone()
            text[:, place] = torch.where(text[:, place] < 0, -1, (text[:, place] + 1) % TEXT.vocabulary)
            found.append(replace(condition, text=text))
    if condition.embeddings is not None:
        for place in range(EMBEDDINGS.length):
            vectors = condition.embeddings.clone()
            vectors[:, place] += 1
            found.append(replace(condition, embeddings=vectors))
    for number, grid in enumerate(condition.codes or ()):
        for place in range(GIVEN[number].size):
            other = grid.clone().flatten(1)
            other[:, place] = (other[:, place] + 1) % GIVEN[number].vocabulary
            grids = [*condition.codes[:number], other.view_as(grid), *condition.codes[number + 1 :]]
            found.append(replace(condition, codes=tuple(grids)))
    return found


def test_what_stands_behind_the_end_of_a_caption_and_embeddings_that_do_not_count_change_nothing():
    prior = prior_that("embeddings")
    codes, condition = random_codes(3, prior), condition_of(3, prior)
    vectors = condition.embeddings.masked_fill(condition.embedding_mask[..., None], 0) * 100
    with torch.no_grad():
        same = prior.logits(codes, replace(condition, embeddings=condition.embeddings + vectors))
        assert torch.equal(same, prior.logits(codes, condition))


def test_given_codes_stand_where_the_image_has_them_and_a_caption_stands_nowhere():
    angles = prior_that("all").angles()
    words = 1 + TEXT.length + EMBEDDINGS.length
    assert (angles[:words] == 0).all()
    map_, depth, codes = angles[words:].split([6, 20, 15])
    # 4 x 5 places are the finest: map columns cover 5 / 3 of them, code rows 4 / 3.
    pairs = prior_that("all").config.head_width // 4
    assert map_[:3, pairs].tolist() == pytest.approx([(i + 0.5) * 5 / 3 - 0.5 for i in range(3)])
    assert depth[5, 0].item() == pytest.approx(1)
    assert codes[5, 0].item() == pytest.approx(1.5 * 4 / 3 - 0.5)


@EVERY_PREFIX
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_gradients_reach_all_parameters(reads, num_classes):
    prior = prior_that(reads, num_classes).train()
    prior(random_codes(40, prior), condition_of(40, prior)).loss.mean().backward()
    assert [n for n, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@EVERY_PREFIX
def test_saved_and_loaded_it_is_the_same(reads, tmp_path):
    prior = prior_that(reads)
    prior.save_pretrained(tmp_path / "prior")
    loaded = load_pretrained(tmp_path / "prior", PRIORS)
    assert (loaded.given, loaded.text, loaded.embeddings) == (prior.given, prior.text, prior.embeddings)
    assert loaded.fingerprint() == prior.fingerprint()
    codes, condition = random_codes(3, prior), condition_of(3, prior)
    assert torch.equal(loaded.nll(codes, condition), prior.nll(codes, condition))


def test_guidance_moves_from_no_text_to_the_text():
    prior = prior_that("all", num_classes=0)
    condition = condition_of(6, prior)
    nothing = replace(
        condition,
        text=torch.full_like(condition.text, -1),
        embedding_mask=torch.zeros_like(condition.embedding_mask),
    )
    greedy = SamplingConfig(temperature=0, guidance=3.0)
    samples = sample_codes(prior, range(6), condition, 0, greedy)[0].flatten(1)
    codes = torch.zeros(6, 15, dtype=torch.int64)
    for position in range(15):
        with torch.no_grad():
            text, null = (prior.logits((codes.view(6, 3, 5),), c)[:, position] for c in (condition, nothing))
        codes[:, position] = (null + 3 * (text - null)).argmax(-1)
    assert torch.equal(samples, codes)
    prior.knows_null_label = False
    with pytest.raises(UserError, match=r"guidance=3.0, expected 1: .* never saw the null label"):
        sample_codes(prior, range(6), condition, 0, greedy)


@EVERY_PREFIX
def test_a_sample_does_not_depend_on_its_batch(reads):
    prior = prior_that(reads, num_classes=0)
    condition, sampling = condition_of(16, prior), SamplingConfig(top_k=8)
    alone = [sample_codes(prior, [i], condition.map(lambda t, i=i: t[i : i + 1]), 5, sampling)[0] for i in range(16)]
    assert torch.equal(torch.cat(alone), sample_codes(prior, range(16), condition, 5, sampling)[0])


@pytest.mark.parametrize("weight", [0.0, 0.125])
def test_learns_the_grid_of_each_of_eight_captions(weight):
    torch.manual_seed(0)
    config = replace(TINY["transformer"], text_loss_weight=weight)
    prior = Transformer(config, tiny_spec(), 0, text=TEXT)
    codes = random_codes(8, prior)
    text = torch.tensor([[number & 1, number >> 1 & 1, 2 + (number >> 2), -1] for number in range(8)])
    condition = Condition(text=text)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = prior(codes, condition)
        loss.loss.mean().backward()
        optimizer.step()
    assert prior.eval().nll(codes, condition).sum(dim=1).max() < 0.1  # nats per image: the caption tells it all
    drawn = sample_codes(prior, range(8), condition, 0, SamplingConfig())
    assert torch.equal(drawn[0], codes[0])
    if weight:  # three words of two equally likely values each cost ln 2 nats a word
        words = prior.text_nll(prior.states(codes, condition), condition)
        assert words.mean().item() == pytest.approx(math.log(2), abs=0.05)


def test_the_loss_of_the_caption_is_its_share_of_the_whole():
    prior = Transformer(replace(TINY["transformer"], text_loss_weight=0.25), tiny_spec(), 0, text=TEXT).eval()
    codes, condition = random_codes(5, prior), condition_of(5, prior)  # captions of 0 to 4 words
    loss, nll = prior(codes, condition)
    torch.testing.assert_close(nll, prior.nll(codes, condition).mean(dim=1))
    words = prior.text_output(prior.states(codes, condition)[:, :4]).log_softmax(-1)  # b t k
    of_each = [F.nll_loss(words[i, :i], condition.text[i, :i]) if i else torch.zeros(()) for i in range(5)]
    torch.testing.assert_close(loss, 0.75 * nll + 0.25 * torch.stack(of_each))


def test_what_cannot_be_read_is_refused():
    prior = prior_that("text")
    codes = random_codes(2, prior)
    with pytest.raises(UserError, match=r"got no text, expected \(2, 4\): the prior was trained on captions"):
        prior.nll(codes, Condition(torch.tensor([0, 1])))
    with pytest.raises(UserError, match=r"got no text, expected \(2, 4\)"):
        prior.stepper(2, Condition(torch.tensor([0, 1])))
    with pytest.raises(UserError, match="a pixelcnn prior reads no text, expected a transformer prior for captions"):
        tiny_prior("pixelcnn", text=TEXT)
    with pytest.raises(UserError, match=r"text_loss_weight=0.125, expected 0 for a prior that reads no captions"):
        Transformer(TransformerConfig(text_loss_weight=0.125), tiny_spec(), 0)
    with pytest.raises(UserError, match="text_loss_weight=1, expected a share from 0 to below 1"):
        TransformerConfig(text_loss_weight=1)
