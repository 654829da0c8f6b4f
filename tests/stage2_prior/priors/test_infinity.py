"""Infinity's own properties; those that all priors share are in test_conformance.py, the original's numbers in
imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import stage2_prior.priors.infinity as infinity
from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from pipelines.codec.prior_coding import decode_with_prior, encode_with_prior
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.exact import exact_stepper
from stage2_prior.priors import Infinity, InfinityConfig
from stage2_prior.priors.base import NO_CODE
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import CLASSES, condition_for, random_codes, tiny_prior
from tests.stage2_prior.tiny_infinity import CONFIG, captions, led_along, made, of_captions, quantizer, spec_of

# ---- sentences ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_words_that_do_not_count_say_nothing_and_those_that_do_are_all_read():
    prior = of_captions()
    codes, condition = random_codes(3, prior), captions(prior, [1, 3, 5])
    expected = prior.logits(codes, condition)
    assert condition.embeddings is not None
    for word in range(5):
        other = condition.embeddings.clone()
        other[:, word] += 1.0
        changed = (prior.logits(codes, replace(condition, embeddings=other)) - expected).abs().amax(dim=2) > 0
        assert torch.equal(changed, torch.tensor([word < count for count in (1, 3, 5)])[:, None].expand_as(changed))


@torch.no_grad()
def test_a_caption_that_is_left_out_has_as_many_null_words_as_it_was_long():
    prior = of_captions()
    null = prior.sentence.null
    condition = captions(prior, [2, 4])
    words, count = prior.sentence(2, prior.forget(condition, torch.tensor([True, False])))
    assert count is not None
    assert count.sum(dim=1).tolist() == [2, 4]
    assert torch.equal(words[0], null)
    assert condition.embeddings is not None
    assert torch.equal(words[1], condition.embeddings[1])
    for nothing in (prior.condition_of(torch.tensor([-1])), prior.unconditional(captions(prior, [0]))):
        words, count = prior.sentence(1, nothing)  # of which nobody knows how long it was
        assert count is not None
        assert count.all()
        assert torch.equal(words[0], null)


def test_a_class_is_a_sentence_of_several_words_that_places_choose_from():
    prior = made(config=replace(CONFIG, class_words=3))
    words, count = prior.sentence(2, Condition(torch.tensor([1, CLASSES])))
    assert count is None
    assert words.shape == (2, 3, 32)
    assert torch.equal(words.flatten(1), prior.sentence.classes.weight[[1, CLASSES]])
    prior(random_codes(2, prior), Condition(torch.tensor([1, CLASSES]))).loss.mean().backward()
    assert all(block.reading.q.weight.grad.abs().sum() > 0 for block in prior.blocks)


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_tokens_of_captions_are_words_too_and_stand_beside_those_of_a_class(num_classes):
    prior = made(num_classes, text=TextSpec(3, 9))
    text = torch.tensor([[1, 2, 3], [1, 2, -1], [1, 2, 4], [2, 1, 3], [-1, -1, -1]])
    condition = replace(condition_for(5, prior), text=text)
    words, _ = prior.sentence(5, condition)
    assert words.shape[1] == 3 + (CONFIG.class_words if num_classes else 0)
    codes = tuple(grid[:1].expand(5, -1, -1) for grid in random_codes(1, prior))
    alike = replace(condition, labels=None if condition.labels is None else torch.zeros(5, dtype=torch.int64))
    logits = prior.logits(codes, alike)
    distances = torch.cdist(logits.transpose(0, 1), logits.transpose(0, 1))
    assert (distances + torch.eye(5) > 1e-4).all()
    found = led_along(prior.stepper(5, condition), codes)
    torch.testing.assert_close(found, prior.logits(codes, condition), rtol=0, atol=2e-5)


@torch.no_grad()
def test_steps_and_the_exact_walk_read_captions_and_classes():
    prior = made(CLASSES, embeddings=EmbeddingSpec(5, 12))
    codes = random_codes(4, prior)
    condition = replace(captions(prior, [1, 5, 0, 3]), labels=torch.arange(4))
    expected = prior.logits(codes, condition)
    torch.testing.assert_close(led_along(prior.stepper(4, condition), codes), expected, rtol=0, atol=2e-5)
    exactly = led_along(exact_stepper(prior, 4, condition), codes)
    known = expected > NO_CODE
    assert float((exactly.float() - expected)[known].abs().max()) < 0.1 * float(expected[known].std())


# ---- bits -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_in_which_grids_bits_lie_changes_no_probability_and_no_sample():
    """The same weights over codes of 6 bits, in one grid of each scale and in two and in three."""
    plain = made(spec=spec_of(6, 6))
    z = torch.randn(4, 6, 6, 9, generator=torch.Generator().manual_seed(2))
    condition = condition_for(4, plain)
    expected = plain.nll(quantizer(6, 6).codes(z), condition).sum(dim=1)
    drawn = sample_codes(plain, range(4), condition, 0, SamplingConfig(temperature=0, guidance=2.0))
    bits_drawn = quantizer(6, 6).codes_to_latents(drawn)
    for per_code in (3, 2):
        prior = made(spec=spec_of(6, per_code))
        prior.load_state_dict(plain.state_dict())
        codes = quantizer(6, per_code).codes(z)
        torch.testing.assert_close(prior.nll(codes, condition).sum(dim=1), expected, rtol=1e-5, atol=0)
        again = sample_codes(prior, range(4), condition, 0, SamplingConfig(temperature=0, guidance=2.0))
        assert torch.equal(quantizer(6, per_code).codes_to_latents(again), bits_drawn)
        assert prior.steps == 4


def test_grids_of_unequal_bits_step_code_and_decode():
    prior = made()  # of 3, 3 and 1 bits
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    with torch.no_grad():
        expected = prior.logits(codes, condition)
    found = led_along(prior.stepper(3, condition), codes)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    last = prior.grids_of(expected[..., 2])[2]
    assert (last == NO_CODE).all()
    labels = [0, None, 2]
    found = decode_with_prior(prior, encode_with_prior(prior, codes, labels), labels)
    assert all(map(torch.equal, found, codes))


def test_training_makes_no_table_and_64_bits_take_few_weights(monkeypatch):
    monkeypatch.setattr(infinity, "logits_of_codes", lambda _: pytest.fail("logits of all codes in training"))
    spec = CodeSpec(tuple(Grid(f"{n}_{g}", n, n, 2**16) for n in (1, 3) for g in range(4)), 12, 12)
    prior = made(0, spec=spec)
    assert prior.output.weight.shape == (128, 32)
    codes = random_codes(2, prior)
    prior(codes, Condition()).loss.mean().backward()
    assert prior.nll(codes, Condition()).shape == (2, 40)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_coarse_codes_count_more_in_the_loss_and_as_much_in_what_is_reported(power):
    prior = made(config=replace(CONFIG, coarse_weight=power))
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    loss, nll = prior(codes, condition)
    each = prior.nll(codes, condition)
    weights = torch.cat([torch.full((grid.size,), (54 / grid.size) ** power) for grid in prior.code_spec.grids])
    torch.testing.assert_close(loss, (each * weights).sum(dim=1) / weights.sum())
    assert nll is not None
    torch.testing.assert_close(nll, each.mean(dim=1))


# ---- guidance -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole_passes(prior: Infinity, codes: Codes, condition: Condition, guidance: Sequence[float], layer: int) -> Tensor:
    """Logits with guidance of what a layer puts out, at each place that of its scale, in one pass over all scales."""
    batch = len(codes[0])
    doubled = tuple(grid.repeat(2, 1, 1) for grid in codes)
    asked = prior.asked(2 * batch, prior.doubled_for_guidance(condition))
    seen = prior.latent(prior.seen(doubled))
    first = (asked.vector[:, None] + prior.start).expand(-1, prior.sizes[0], -1)
    x = torch.cat([first, seen], dim=1) + prior.scale_vectors(prior.scale_of)
    mask, turns = prior.scale_of[:, None] >= prior.scale_of, prior.turns()
    weights = torch.tensor(guidance)[prior.scale_of][None, :, None]
    shared = prior.shared(asked.vector)
    for number, block in enumerate(prior.blocks):
        x = block(x, shared, asked, turns, mask)
        if number == len(prior.blocks) - layer:
            x = (weights * x[:batch] + (1 - weights) * x[batch:]).repeat(2, 1, 1)
    scale, shift = prior.output_modulation(asked.vector).unbind(2)
    logits = prior.output(infinity.modulated(x, scale, shift))[:batch]
    return torch.cat([prior.code_logits(part) for part in logits.split(prior.sizes, dim=1)], dim=1)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("by", ["classes", "captions"])
def test_guidance_of_a_layer_is_that_of_whole_passes(layer, by):
    prior = made() if by == "classes" else of_captions()
    condition = Condition(torch.tensor([0, 2, 3])) if by == "classes" else captions(prior, [2, 5, 3])
    codes, guidance = random_codes(3, prior), [1.0, 2.0, 3.5, 0.5]
    expected = whole_passes(prior, codes, condition, guidance, layer)
    found = led_along(prior.stepper_guided_inside(3, condition, guidance, layer), codes)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(found, led_along(prior.stepper(3, condition), codes), rtol=0, atol=1e-2)


def test_samples_with_guidance_of_a_layer_are_drawn_from_it_and_cost_less():
    prior = made()
    condition, costs = Condition(torch.tensor([0, 1, 2, 3])), []
    for layer in (0, 1, 3):
        sampling = SamplingConfig(temperature=0, guidance=4.0, guidance_schedule="linear", guidance_layer=layer)
        with FlopCounterMode(display=False) as counter:
            codes = sample_codes(prior, range(4), condition, 0, sampling)
        costs.append(counter.get_total_flops())
        if layer:
            guidance = [sampling.guidance_at(step, 4) for step in range(4)]
            logits = whole_passes(prior, codes, condition, guidance, layer)
            assert torch.equal(prior.sequence(codes, condition), logits.argmax(-1))
    assert costs[0] >= costs[1] > 1.3 * costs[2]  # whose last two layers are of half as many samples


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("infinity", "guidance_layer=4 for an infinity prior, expected 0 to 3; leave it out to guide the logits"),
        ("var", "guidance_layer=4 for a var prior, expected an infinity prior; leave it out"),
    ],
)
def test_guidance_of_no_layer_is_refused(kind, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(guidance_layer=4).check_fits(made() if kind == "infinity" else tiny_prior(kind))
    with pytest.raises(UserError, match="guidance_layer=-1, expected 0"):
        SamplingConfig(guidance_layer=-1)


# ---- the network ----------------------------------------------------------------------------------------------------


def test_an_image_costs_less_than_one_pass():
    prior = made()
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        prior.logits(codes, condition)
    with FlopCounterMode(display=False) as stepped:
        led_along(prior.stepper(2, condition), codes)
    assert 0.5 * whole.get_total_flops() < stepped.get_total_flops() <= whole.get_total_flops()


def test_the_published_size():
    """2 billion: 32 layers of width 2048 over 32 bits, after captions of T5-XL."""
    spec = CodeSpec(tuple(Grid(f"{n}_{g}", n, n, 256) for n in (1, 64) for g in range(4)), 1024, 1024)
    config = InfinityConfig(layers=32, width=2048, heads=16)
    with torch.device("meta"):
        prior = Infinity(config, spec, 0, embeddings=EmbeddingSpec(512, 2048))
    d, c = 2048, 2048
    own = 32 * (8 * d * d + 2 * d * 4 * d) + 6 * d * d + 2 * d * d  # as the original counts: attentions, layers, norms
    words = 2 * c * d + d * d + (c * d + d * d)
    assert sum(weight.numel() for weight in prior.parameters()) == pytest.approx(own + words, rel=0.002)


def test_a_path_is_dropped_for_whole_samples_and_the_words_are_read_all_the_same():
    prior = made(config=replace(CONFIG, drop_path=0.9, layers=2)).train()
    torch.manual_seed(0)
    kept = prior.kept_paths(torch.ones(200, 3, 4))
    assert kept[0].unique().tolist() == [1.0]
    torch.testing.assert_close(kept[1].unique(), torch.tensor([0.0, 10.0]))
    block, asked = prior.blocks[1], prior.asked(3, Condition(torch.arange(3)))
    x, shared, turns = torch.randn(3, 6, 32), prior.shared(asked.vector), prior.turns()[:6]
    out = block(x, shared, asked, turns, torch.ones(6, 6, dtype=torch.bool), torch.zeros(2, 3, 1, 1))
    keys, values = block.reading.words.keys_and_values(asked.words)
    torch.testing.assert_close(out, x + block.reading(x, keys, values, None))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"width": 36, "heads": 6}, "width=36 with heads=6, expected a width that is a multiple of 24"),
        ({"class_words": 0}, "class_words=0, expected at least 1"),
        ({"coarse_weight": -0.5}, r"coarse_weight=-0.5, expected 0 .*published: 0\.5"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        InfinityConfig(**setting)


@pytest.mark.parametrize(
    "grids",
    [
        (Grid("a", 4, 4, 8),),
        (Grid("a", 1, 1, 9), Grid("b", 2, 2, 9)),
        (Grid("a", 1, 1, 8), Grid("b", 2, 2, 4)),
        (Grid("a", 2, 2, 8), Grid("b", 1, 1, 8)),
    ],
)
def test_codes_that_are_no_bits_on_scales_are_refused(grids):
    with pytest.raises(
        UserError, match=r"expected two or more scales of rising sides .* quantizer\.kind=multiscale_bsq"
    ):
        Infinity(CONFIG, CodeSpec(grids, 16, 16), 0)
    with pytest.raises(UserError, match="width=384, expected a multiple of 10: words of 1280 numbers are pooled by so"):
        Infinity(InfinityConfig(width=384), spec_of(), 0, embeddings=EmbeddingSpec(4, 1280))
