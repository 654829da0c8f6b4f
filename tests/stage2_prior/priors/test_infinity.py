"""Infinity's own properties; those that all priors share are in test_conformance.py, the original's numbers in
imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import stage2_prior.priors.infinity as infinity
from codes.shards import CodeShardWriter
from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from pipelines.codec.prior_coding import decode_with_prior, encode_with_prior
from stage1_vq.quantizers import (
    MultiscaleBitsConfig,
    MultiscaleBitsQuantizer,
    MultiscaleBSQConfig,
    MultiscaleBSQuantizer,
)
from stage2_prior.condition import Condition, EmbeddingSpec, TextSpec
from stage2_prior.exact import exact_stepper
from stage2_prior.priors import PRIORS, Infinity, InfinityConfig
from stage2_prior.priors.base import NO_CODE
from stage2_prior.priors.bit_latents import BitLatents, places_on_last
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import Stepper, walk
from stage2_prior.text import tokenize
from stage2_prior.text_encoder import TextEncoder
from stage2_prior.train import Stage2Config, Stage2Task, train_stage2
from tests.stage2_prior.tiny import CLASSES, condition_for, random_codes, tiny_prior
from tests.stage2_prior.tiny_text_encoder import WIDTH, save_text_encoder
from training.loop import TrainConfig

CONFIG = InfinityConfig(layers=3, width=32, heads=2)
SCALES = (1, 2, 4, 6)  # of maps 6x9


def quantizer(dim: int = 7, bits_per_code: int = 3) -> MultiscaleBSQuantizer:
    return MultiscaleBSQuantizer(MultiscaleBSQConfig(scales=SCALES, dim=dim, bits_per_code=bits_per_code)).eval()


def spec_of(dim: int = 7, bits_per_code: int = 3) -> CodeSpec:
    """Codes of 7 bits: three grids of each scale, the last of which has one bit."""
    return CodeSpec(quantizer(dim, bits_per_code).grids(6, 9), 24, 36)


def made(
    num_classes: int = CLASSES, config: InfinityConfig = CONFIG, spec: CodeSpec | None = None, **facts: Any
) -> Infinity:
    prior = tiny_prior("infinity", num_classes, spec or spec_of(), config=config, **facts)
    assert isinstance(prior, Infinity)
    return prior


def captions(prior: Infinity, counts: Sequence[int]) -> Condition:
    """Sentences of so many words, and what stands behind them."""
    assert prior.embeddings is not None
    shape = (len(counts), prior.embeddings.length, prior.embeddings.width)
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
    return Condition(embeddings=vectors, embedding_mask=mask)


def of_captions(length: int = 5, width: int = 12, **facts: Any) -> Infinity:
    return made(0, embeddings=EmbeddingSpec(length, width), **facts)


def led_along(stepper: Stepper, codes: Codes) -> Tensor:
    """Logits of all codes, `b n k`."""
    sequence = torch.cat([grid.flatten(1) for grid in codes], dim=1)
    steps: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        steps.append(logits)
        return sequence[:, position : position + logits.shape[1]]

    walk(stepper, sequence.shape[1], choose)
    return torch.cat(steps, dim=1)


# ---- what a scale sees ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_scale_sees_what_the_tokenizer_has_summed_before_it_bilinearly_on_its_grid():
    prior = made()
    codes = random_codes(3, prior)
    seen = prior.seen(codes)
    start = 0
    for scale, grids in enumerate(prior.scales[1:], start=1):
        total = quantizer().latents_of_first(codes[: 3 * scale], 6, 9)
        size = codes[grids.start].shape[1:]
        expected = rearrange(F.interpolate(total, size=size, mode="bilinear"), "b d h w -> b (h w) d")
        torch.testing.assert_close(seen[:, start : start + expected.shape[1]], expected, rtol=0, atol=1e-5)
        start += expected.shape[1]
    assert start == seen.shape[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior.seen(codes), seen)  # float32 all the same


def test_places_stand_where_the_originals_stand():
    """Rows and columns of a 2x3 scale on one of 5x8: 0, 2.5 (rounded to the even 2) and 0, 2.67, 5.33."""
    grids = [Grid("a", 2, 3, 2), Grid("b", 5, 8, 2)]
    assert places_on_last(grids) == [0, 3, 5, 16, 19, 21, *range(40)]


def slowly_mended(latents: BitLatents, codes: Codes, flips: Sequence[Tensor], ties: Codes) -> list[Tensor]:
    """What is to be told, place by place and bit by bit; ties: codes whose bits hold where nothing is left of either
    sign."""
    told, given = list[Tensor](), list[Tensor]()
    for number, grid in enumerate(codes):
        wanted, channels = grid.clone(), latents.channels[number]
        places = range(channels.stop - channels.start - 1, -1, -1) if number else range(0)
        missing = plain_sum(latents, codes, number) - plain_sum(latents, given, number) if number else torch.zeros(())
        for b, y, x in torch.cartesian_prod(*(torch.arange(side) for side in grid.shape)).tolist():
            for channel, place in enumerate(places, start=channels.start):
                own = F.adaptive_avg_pool2d(missing, grid.shape[1:])[b, channel, y, x]
                rest = float(own) + (2 * (int(grid[b, y, x]) >> place & 1) - 1) / latents.width**0.5
                on = int(ties[number][b, y, x]) >> place & 1 if abs(rest) < 1e-5 else int(rest > 0)
                wanted[b, y, x] = (int(wanted[b, y, x]) & ~(1 << place)) | (on << place)
        told.append(wanted)
        given.append(wanted ^ flips[number])
    return told


def plain_sum(latents: BitLatents, codes: Sequence[Tensor], count: int) -> Tensor:
    total = None
    for number in range(count):
        total = latents.add(total, codes[number], number)
    assert total is not None
    return total


def test_bits_after_a_mistake_are_the_signs_of_what_is_missing():
    prior = made()
    codes = random_codes(4, prior)
    told, given = prior.with_mistakes(codes, 0.9)
    flips = [a ^ b for a, b in zip(told, given, strict=True)]
    assert all(map(torch.equal, told, slowly_mended(BitLatents(prior.code_spec), codes, flips, told)))
    assert all(map(torch.equal, told[:3], codes[:3]))
    assert not torch.equal(told[-3], codes[-3])
    prior.code_spec.check(given)
    told, given = prior.with_mistakes(codes, 0.0)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(told, given, codes, strict=True))


def test_what_is_told_after_mistakes_is_what_the_tokenizer_would_have_told():
    """Of real latents: nearly all labels are those that the tokenizer finds for them after the flipped bits."""
    tokenizer, prior = quantizer(6, 6), made(spec=spec_of(6, 6))
    z = torch.randn(64, 6, 6, 9, generator=torch.Generator().manual_seed(2)) * 0.4
    codes = tokenizer.codes(z)
    torch.manual_seed(0)
    told, given = prior.with_mistakes(codes, 0.6)
    for scale in range(1, 4):
        labels = tokenizer.codes_after(z, given[:scale])[scale]
        agree, alone = ((labels ^ some[scale]) for some in (told, codes))
        wrong, wrong_alone = (
            sum(float((number >> bit & 1).float().mean()) for bit in range(6)) / 6 for number in (agree, alone)
        )
        assert wrong < 0.5 * wrong_alone


def test_the_share_of_flipped_bits_is_drawn_evenly_for_each_image_and_scale():
    prior = made(spec=CodeSpec(tuple(Grid(f"{n}", n, n, 256) for n in (20, 30)), 60, 60))
    codes = random_codes(400, prior)
    told, given = prior.with_mistakes(codes, 0.3)
    for a, b in zip(told, given, strict=True):
        shares = torch.stack([((a ^ b) >> bit & 1).float().mean(dim=(1, 2)) for bit in range(8)])
        assert float(shares.mean()) == pytest.approx(0.15, abs=0.02)
        assert float(shares.mean(dim=0).std()) == pytest.approx(0.3 / 12**0.5, abs=0.01)


def test_a_training_step_with_mistakes_tells_what_mends_them():
    prior, seen = made(), []
    batch = {"codes": random_codes(20, prior), "labels": torch.arange(20) % CLASSES}

    def model(codes: Codes, condition: Condition, given: Codes) -> Any:
        seen.append((codes, condition, given))
        return prior(codes, condition, given)

    loss = Stage2Task(prior, 0.0, flipped_codes=0.9).step(model, batch, 0).loss
    ((told, condition, given),) = seen
    logits = prior.logits(given, condition)
    expected = F.cross_entropy(logits.transpose(1, 2), prior.sequence(told, condition))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


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
        ("infinity", "guidance_layer=4 for a infinity prior, expected 0 to 3; leave it out to guide the logits"),
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


# ---- latents that bits alone do not tell ----------------------------------------------------------------------------


def lfq() -> MultiscaleBitsQuantizer:
    """XQ-GAN's, whose convolutions are no identities and whose corners shrink."""
    torch.manual_seed(1)
    made = MultiscaleBitsQuantizer(MultiscaleBitsConfig(scales=SCALES, bits=5, dim=5, phis=2, ratio=0.8)).eval()
    for tensor in made.phis.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    return made


def shards(folder: Path, spec: CodeSpec, codes_are_bits: bool | None, latents: dict[str, Tensor] | None = None) -> Path:
    """48 training and 16 validation images of four classes: a class has one code, another one on each scale."""
    writer = CodeShardWriter(
        folder, spec, ["train", "validation"], class_names=("a", "b", "c", "d"), stage1_fingerprint="f00d",
        latents=latents, codes_are_bits=codes_are_bits,
    )  # fmt: skip
    for number, count in enumerate((48, 16)):
        labels = torch.arange(count) % CLASSES
        codes = tuple(
            ((3 * labels + scale) % grid.vocabulary).view(-1, 1, 1).expand(count, grid.height, grid.width)
            for scale, grid in enumerate(spec.grids)
        )
        writer.write(number, codes, labels, [f"{'abcd'[i % CLASSES]}_{i}.png" for i in range(count)])
    writer.finish()
    return folder


def settings(steps: int = 60) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch_size=16, learning_rate=1e-2, log_every=10, validate_every=steps // 3, preview_every=0,
        save_every=steps, tracker="none", workers=0,
    )  # fmt: skip


@torch.no_grad()
def test_convolutions_beside_the_codes_are_part_of_what_a_scale_sees(tmp_path):
    latents = lfq().scale_latents()
    spec = CodeSpec(lfq().grids(6, 9), 24, 36)
    config = Stage2Config(model=replace(CONFIG, layers=1), train=settings(3))
    with torch.enable_grad():
        train_stage2(config, shards(tmp_path / "codes", spec, True, latents), tmp_path / "run")
    prior = load_pretrained(tmp_path / "run", PRIORS)
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    expected = [rearrange(x, "b d h w -> b (h w) d") for x in lfq().next_scale_inputs(codes)]
    torch.testing.assert_close(prior.seen(codes), torch.cat(expected, dim=1), rtol=0, atol=1e-4)
    logits = prior.logits(codes, condition)
    for stepper, atol in ((prior.stepper(3, condition), 2e-5), (exact_stepper(prior, 3, condition), 2e-2)):
        torch.testing.assert_close(led_along(stepper, codes).float(), logits, rtol=0, atol=atol)
    told, given = prior.with_mistakes(codes, 0.5)
    prior.code_spec.check(given)
    assert not torch.equal(told[-1], codes[-1])


# ---- from codes to a trained model ----------------------------------------------------------------------------------


def test_a_run_learns_the_bits_of_each_class_and_draws_them(tmp_path):
    codes = shards(tmp_path / "codes", spec_of(), True)
    result = train_stage2(Stage2Config(model=replace(CONFIG, layers=2), train=settings()), codes, tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.05  # of 7 bits in three codes before
    prior = load_pretrained(tmp_path / "run", PRIORS)
    assert prior.kind == "infinity"
    labels = torch.tensor([3, 1])
    drawn = sample_codes(prior, range(2), Condition(labels), 0, SamplingConfig())
    for scale, (grid, of) in enumerate(zip(drawn, prior.code_spec.grids, strict=True)):
        assert torch.equal(grid, ((3 * labels + scale) % of.vocabulary).view(-1, 1, 1).expand_as(grid))


@pytest.mark.parametrize("encoded", [False, True])
def test_a_run_learns_from_captions_with_and_without_a_text_encoder(tmp_path, encoded):
    """What names the images tells their class: in words that the prior learns, or in those of a small T5."""
    codes, own = shards(tmp_path / "codes", spec_of(), True), {}
    if encoded:
        (tmp_path / "t5").mkdir()
        own = {"text_encoder": str(save_text_encoder(tmp_path / "t5"))}
    config = Stage2Config(
        model=replace(CONFIG, layers=2), train=settings(), captions="file-names", text_length=4, **own
    )
    result = train_stage2(config, codes, tmp_path / "run")
    assert result.metrics["bits_per_code"] < 0.1
    prior = load_pretrained(tmp_path / "run", PRIORS)
    if encoded:
        assert prior.embeddings == EmbeddingSpec(4, WIDTH, str(tmp_path / "t5"))
        encoder = TextEncoder.load(prior.embeddings.encoder)
        vectors, mask = encoder.encode(tokenize(encoder.tokenizer, ["a", "d"], 4), prior.padded_left)
        condition = Condition(embeddings=vectors, embedding_mask=mask)
    else:
        condition = Condition(text=prior.tokenize(["a", "d"]))
    last = sample_codes(prior, range(2), condition, 0, SamplingConfig())[-2]
    assert last[:, 0, 0].tolist() == [(3 * label + 10) % 8 for label in (0, 3)]


def test_codes_that_are_not_said_to_be_bits_are_told_of_or_refused(tmp_path, capsys):
    config = Stage2Config(model=CONFIG, train=settings(3))
    with pytest.raises(UserError, match=r"whose codes are numbers of code vectors .*multiscale_bits; take a var prior"):
        train_stage2(config, shards(tmp_path / "vectors", spec_of(), False), tmp_path / "run")
    train_stage2(config, shards(tmp_path / "unsaid", spec_of(), None), tmp_path / "run")
    assert "does not say whether its codes are bits, as of quantizer.kind=multiscale_bsq" in capsys.readouterr().out
