"""The properties of VQ-GAN's GPT that not all priors share; the others are in test_conformance.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors.mingpt import Block, MinGPT, MinGPTConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import walk
from tests.stage2_prior.tiny import tiny_spec

CONFIG = MinGPTConfig(layers=2, width=24, heads=3)
GIVEN = (Grid("depth", 2, 3, 13), Grid("edges", 1, 2, 5))


def gpt(config: MinGPTConfig = CONFIG, num_classes: int = 0, **facts: Any) -> MinGPT:
    torch.manual_seed(0)
    prior = MinGPT(config, tiny_spec(3, 4), num_classes, **facts)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return prior.eval()


def codes_of(grids: tuple[Grid, ...], batch: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(grid.vocabulary, (batch, grid.height, grid.width), generator=generator) for grid in grids
    )


def stepped(prior: MinGPT, codes: Tensor, condition: Condition) -> Tensor:
    """Logits `b n k` of a stepper that is led along the codes, b h w."""
    flat, seen = codes.flatten(1), []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return flat[:, position : position + 1]

    walk(prior.stepper(len(codes), condition), flat.shape[1], choose)
    return torch.cat(seen, dim=1)


@pytest.mark.parametrize("unmasked", [0, 3])
@torch.no_grad()
def test_a_block_is_pytorchs_own(unmasked):
    prior = gpt(replace(CONFIG, unmasked=unmasked), given=GIVEN)
    block = prior.blocks[0]
    assert isinstance(block, Block)
    torchs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.", "linear1.": "up."}
    names |= {"linear2.": "down.", "norm1.": "attention_norm.", "norm2.": "feed_forward_norm."}
    ours = block.state_dict()
    torchs.load_state_dict({t + part: ours[o + part] for t, o in names.items() for part in ("weight", "bias")})
    hidden = torch.ones(8, 8).triu(1).bool()
    hidden[:unmasked, :unmasked] = False
    x = torch.randn(2, 8, 24)
    torch.testing.assert_close(block(x, prior.mask(8)), torchs(x, hidden), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_class_a_start_and_a_code_of_one_number_are_the_same_to_it():
    by_class = gpt(replace(CONFIG, vocabulary=11), num_classes=4)
    by_start = gpt(replace(CONFIG, vocabulary=11, start=2))
    by_codes = gpt(replace(CONFIG, vocabulary=11), given=(Grid("one", 1, 1, 3),))
    (codes,) = codes_of((by_class.grid,))
    label = torch.full((5,), 2)
    expected = by_class.logits((codes,), Condition(label))
    assert torch.equal(by_start.logits((codes,), Condition()), expected)
    assert torch.equal(by_codes.logits((codes,), Condition(codes=(label[:, None, None],))), expected)


@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("unmasked", [0, 6])
@torch.no_grad()
def test_given_codes_come_before_the_codes_and_are_seen_by_all(num_classes, unmasked):
    prior = gpt(replace(CONFIG, unmasked=unmasked), num_classes, given=GIVEN)
    (codes,), given = codes_of((prior.grid,)), codes_of(GIVEN)
    labels = torch.arange(5) % 5 if num_classes else None
    logits = prior.logits((codes,), Condition(labels, given))
    assert logits.shape == (5, 12, 11)
    torch.testing.assert_close(stepped(prior, codes, Condition(labels, given)), logits, rtol=0, atol=1e-5)
    for number, grid in enumerate(GIVEN):
        others = list(given)
        others[number] = (given[number] + 1) % grid.vocabulary
        change = (prior.logits((codes,), Condition(labels, tuple(others))) - logits).abs().amax(dim=(0, 2))
        assert (change > 0).all()
    for position in range(12):
        other = codes.flatten(1).clone()
        other[:, position] = (other[:, position] + 1) % 11
        change = (prior.logits((other.view_as(codes),), Condition(labels, given)) - logits).abs().amax(dim=(0, 2))
        assert (change[: position + 1] == 0).all()
        assert (change[position + 1 :] > 0).all()


@torch.no_grad()
def test_first_places_that_see_each_other_see_what_comes_later_among_them():
    causal, both = gpt(given=GIVEN), gpt(replace(CONFIG, unmasked=8), given=GIVEN)
    x = torch.randn(1, 8, 24)
    other = torch.cat([x[:, :7], torch.randn(1, 1, 24)], dim=1)
    for prior, sees in ((causal, False), (both, True)):
        change = (prior.hidden(x) - prior.hidden(other)).abs().amax(dim=(0, 2))[:7]
        assert (change > 1e-3).all() if sees else (change == 0).all()


def test_samples_of_given_codes_do_not_depend_on_the_batch():
    prior = gpt(given=GIVEN)
    given = codes_of(GIVEN, 9)
    settings = SamplingConfig(top_k=6)

    def sampled(indices: range) -> Tensor:
        condition = Condition(codes=tuple(grid[indices.start : indices.stop] for grid in given))
        return sample_codes(prior, indices, condition, 3, settings)[0]

    together = sampled(range(9))
    assert torch.equal(torch.cat([sampled(range(i, i + 1)) for i in range(9)]), together)
    assert len(together.flatten(1).unique(dim=0)) == 9


def test_an_image_costs_no_more_than_one_pass():
    prior = gpt(num_classes=4)
    (codes,) = codes_of((prior.grid,))
    condition = Condition(torch.arange(5) % 4)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        prior.logits((codes,), condition)
    with FlopCounterMode(display=False) as steps:
        stepped(prior, codes, condition)
    assert 0.5 * whole.get_total_flops() < steps.get_total_flops() <= whole.get_total_flops()


def test_numbers_and_places_are_as_many_as_it_takes_or_as_the_config_says():
    assert gpt(num_classes=20).embedding.num_embeddings == 21  # with the null label
    assert gpt(given=GIVEN).embedding.num_embeddings == 13
    assert gpt(given=GIVEN).positions.shape == (8 + 12 - 1, 24)
    larger = gpt(replace(CONFIG, vocabulary=50, positions=40))
    assert (larger.embedding.num_embeddings, len(larger.positions)) == (50, 40)
    (codes,) = codes_of((larger.grid,))
    assert larger.logits((codes,), Condition()).shape == (5, 12, 11)


@torch.no_grad()
def test_dropout_of_attention_is_for_training_only():
    prior, plain = gpt(replace(CONFIG, attention_dropout=0.5)), gpt()
    codes, condition = codes_of((prior.grid,)), Condition()
    assert torch.equal(prior.logits(codes, condition), plain.logits(codes, condition))
    prior.train()
    assert not torch.allclose(prior.logits(codes, condition), plain.logits(codes, condition), atol=1e-2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"heads": 5}, "width=24 with heads=5, expected a width that the heads divide"),
        ({"unmasked": -1}, "unmasked=-1, expected 0 or more"),
        ({"start": -2}, "start=-2, expected 0 or more"),
        ({"attention_dropout": 1.0}, r"attention_dropout=1.0, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"vocabulary": 10},
            "vocabulary=10, expected at least 11 for 3x4 codes of 11 .*; leave it out to have",
        ),
        ({"positions": 11}, "positions=11, expected at least 12 for 3x4 codes of 11"),
        ({"unmasked": 2}, "unmasked=2, expected at most 1, the places before the codes: a code must not see those"),
    ],
)
def test_configs_too_small_for_the_codes_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        gpt(replace(CONFIG, **setting))


def test_codes_of_several_grids_are_refused():
    with pytest.raises(UserError, match="expected one grid: a mingpt prior models one"):
        MinGPT(CONFIG, CodeSpec(GIVEN, 8, 8), 0)
