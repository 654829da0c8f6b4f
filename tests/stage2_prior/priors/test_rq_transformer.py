"""The RQ-Transformer's own properties; those that all priors share are in test_conformance.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, RQTransformer, RQTransformerConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.stepping import walk
from tests.stage2_prior.tiny import TINY, condition_for, labelled, random_codes, spec_of, tiny_prior, tiny_spec

DEPTH, PLACES = 3, 6  # of the tiny prior: 2x3 places


def test_the_order_is_place_by_place_and_all_depths_of_a_place_before_the_next():
    prior = tiny_prior("rq_transformer")
    depths = torch.arange(DEPTH).view(-1, 1, 1, 1)
    places = torch.arange(PLACES).view(1, 1, 2, 3)
    codes = tuple(10 * depths + places)  # one 1 2 3 for each depth
    sequence = prior.sequence(codes, condition_for(1, prior))
    assert sequence[0].tolist() == [10 * depth + place for place in range(PLACES) for depth in range(DEPTH)]
    back = prior.grids_of(sequence)
    assert all(torch.equal(grid, again) for grid, again in zip(codes, back, strict=True))


def test_what_is_sampled_lies_in_the_grid_of_its_depth():
    prior = tiny_prior("rq_transformer")
    samples = sample_codes(prior, range(20), labelled(20, prior), 0, SamplingConfig(temperature=1e6))
    prior.code_spec.check(samples)
    assert [int(grid.max()) for grid in samples] == [10, 6, 8]


def naive_logits(prior: RQTransformer, codes: tuple[Tensor, ...], label: int) -> list[list[Tensor]]:
    """Logits by place and depth of one image: equations 7 to 9 of the paper, written as loops over places and depths,
    with both transformers run over nothing but what is known."""
    tables = prior.embedding.weight.split([grid.vocabulary for grid in prior.code_spec.grids])
    outputs = prior.output.weight.split([grid.vocabulary for grid in prior.code_spec.grids])
    over_places, over_depths = prior.angles()
    flat = [grid.flatten().tolist() for grid in codes]
    inputs, logits = [prior.classes.weight[label]], []
    for place in range(len(flat[0])):
        known = prior.spatial(torch.stack(inputs)[None], over_places[: place + 2])[0, -1]
        vectors = [tables[depth][flat[depth][place]] for depth in range(prior.depth)]
        walked: list[Tensor] = []
        logits.append([])
        for depth in range(prior.depth):
            before = known if depth == 0 else torch.stack(vectors[:depth]).sum(0)
            walked.append(before + prior.depths.weight[depth])
            logits[-1].append(
                F.linear(prior.over_depth(torch.stack(walked)[None], over_depths[: depth + 2])[0, -1], outputs[depth])
            )
        inputs.append(torch.stack(vectors).sum(0))
    return logits


def test_logits_equal_two_transformers_walked_by_hand():
    prior = tiny_prior("rq_transformer")
    codes = random_codes(1, prior)
    with torch.no_grad():
        expected = naive_logits(prior, tuple(grid[0] for grid in codes), label=2)
        logits = prior.logits(codes, Condition(torch.tensor([2])))[0].unflatten(0, (PLACES, DEPTH))
    for place in range(PLACES):
        for depth, vocabulary in enumerate((11, 7, 9)):
            torch.testing.assert_close(logits[place, depth, :vocabulary], expected[place][depth], rtol=0, atol=1e-5)


def test_a_code_is_seen_by_deeper_codes_of_its_place_and_by_later_places_only():
    prior = tiny_prior("rq_transformer")
    codes, condition = random_codes(4, prior), condition_for(4, prior)
    for depth in range(DEPTH):
        other = [grid.clone() for grid in codes]
        place = other[depth][:, 0, 1]  # place 1
        place.copy_((place + 1) % prior.code_spec.grids[depth].vocabulary)
        with torch.no_grad():
            change = (prior.logits(codes, condition) - prior.logits(tuple(other), condition)).abs().amax(dim=(0, 2))
        moved = (change > 0).view(PLACES, DEPTH)
        assert not moved[0].any()
        assert moved[1].tolist() == [later > depth for later in range(DEPTH)]
        assert moved[2:].all()


def test_the_spatial_transformer_runs_once_for_each_place():
    prior = tiny_prior("rq_transformer")
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    sequence = prior.sequence(codes, condition)
    stepper, calls = prior.stepper(2, condition), []
    step = stepper.spatial.step
    stepper.spatial.step = lambda x, place: calls.append(place) or step(x, place)
    walk(stepper, DEPTH * PLACES, lambda position, logits: sequence[:, position : position + 1])
    assert calls == list(range(PLACES))


def test_attention_costs_less_than_one_over_all_codes():
    """Arithmetic of attention alone, which the plain transformer has over D times as many tokens."""
    grids = tuple(Grid(f"depth{depth}", 8, 8, 16) for depth in range(4))
    spec = CodeSpec(grids, 32, 32, 3)

    def attention(kind: str, config: object) -> int:
        prior = PRIORS[kind](config, spec, 0).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            prior.logits(random_codes(1, prior), Condition())
        products = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        return sum(count for name, count in products.items() if "attention" in name)

    plain = attention("transformer", replace(TINY["transformer"], layers=2))
    ours = attention("rq_transformer", RQTransformerConfig(layers=2, depth_layers=2, width=32, heads=4))
    assert 0 < ours < plain / 4


def test_one_depth_is_a_prior_of_one_grid():
    prior = tiny_prior("rq_transformer", spec=tiny_spec(2, 3))
    codes, condition = random_codes(3, prior), condition_for(3, prior)
    sequence = prior.sequence(codes, condition)
    assert torch.equal(sequence, codes[0].flatten(1))
    stepper = prior.stepper(3, condition)
    stepped = [stepper.next(sequence[:, i - 1 : i] if i else None) for i in range(6)]
    with torch.no_grad():
        expected = prior.logits(codes, condition)
    torch.testing.assert_close(torch.cat(stepped, dim=1), expected, rtol=0, atol=1e-5)


def test_fresh_weights_are_small_and_smaller_where_they_add_to_a_residual_stream():
    torch.manual_seed(0)
    prior = RQTransformer(
        RQTransformerConfig(layers=8, depth_layers=2, width=64, heads=4), spec_of("rq_transformer"), 0
    )
    blocks = {"spatial": prior.spatial.blocks[0], "depth": prior.over_depth.blocks[0]}
    assert blocks["spatial"].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert blocks["spatial"].attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert blocks["depth"].feed_forward.down.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)


def test_grids_of_several_sizes_are_refused():
    spec = CodeSpec((Grid("top", 2, 2, 8), Grid("bottom", 4, 4, 8)), 16, 16)
    message = (
        r"got codes of 2x2 codes of 8 \+ 4x4 codes of 8 .*, expected grids of equal sides: an rq_transformer prior "
        r"models the depths of a residual or grouped quantizer; take a transformer prior for grids of several sizes"
    )
    with pytest.raises(UserError, match=message):
        RQTransformer(RQTransformerConfig(), spec, 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"depth_layers": 0}, "depth_layers=0, expected at least 1"),
        ({"width": 36, "heads": 4}, "width=36 with heads=4, expected a width that is a multiple of 16"),
        ({"dropout": 1.0}, "dropout=1.0, expected a share from 0 to below 1"),
        ({"residual_dropout": -0.1}, "residual_dropout=-0.1, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        RQTransformerConfig(**setting)


def test_dropout_of_places_is_in_training_only():
    torch.manual_seed(0)
    config = replace(TINY["rq_transformer"], dropout=0.5)
    prior = RQTransformer(config, spec_of("rq_transformer"), 0)
    codes = random_codes(2, prior)
    with torch.no_grad():
        assert (prior.logits(codes, Condition()) != prior.logits(codes, Condition())).any()
        prior.eval()
        assert torch.equal(prior.logits(codes, Condition()), prior.logits(codes, Condition()))
