"""PixelSNAIL's own properties; those that all priors share are in test_conformance.py, given codes in
test_given_codes.py, and the published layers in ../imports/test_pixelsnail.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.drawing import inverse_cdf, noise
from stage2_prior.priors.gated_convolutions import CausalConvolution, Convolution
from stage2_prior.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig
from stage2_prior.priors.pixelsnail_layers import Attention
from stage2_prior.stepping import walk
from tests.stage2_prior.tiny import TINY, condition_for, labelled, random_codes, tiny_prior, tiny_spec


def tiny(**changes: object) -> PixelSNAIL:
    """Of 6x7 codes, without classes, with no weight that is as it began."""
    torch.manual_seed(0)
    prior = PixelSNAIL(replace(TINY["pixelsnail"], **changes), tiny_spec(6, 7), 0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return prior.eval()


def test_the_weight_is_a_direction_of_a_length():
    torch.manual_seed(0)
    theirs = weight_norm(nn.Conv2d(5, 4, 3, padding=1))
    ours = Convolution(5, 4, 3)
    ours.load_state_dict(
        {
            "gain": 2 * theirs.parametrizations.weight.original0,
            "direction": 3 * theirs.parametrizations.weight.original1,
            "bias": theirs.bias,
        }
    )
    x = torch.randn(2, 5, 6, 7)
    bias = theirs.bias[:, None, None]
    torch.testing.assert_close(ours(x) - bias, 2 * (theirs(x) - bias))
    fresh = Convolution(5, 4, 3)
    torch.testing.assert_close(fresh.weight(), fresh.direction.detach())


def test_a_causal_convolution_sees_the_rows_above_and_what_is_left_of_it():
    convolution, x = CausalConvolution(1, 1, 5), torch.zeros(1, 1, 8, 8, requires_grad=True)
    convolution(x)[0, 0, 5, 4].backward()
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:5, 2:7] = True
    expected[5, 2:4] = True
    assert torch.equal(x.grad[0, 0] != 0, expected)
    # What it does not see does not count for the length of the weight either.
    torch.testing.assert_close(convolution.weight().norm(), convolution.gain.abs().squeeze())


def test_the_first_features_know_the_codes_near_by_and_not_their_own():
    prior, codes = tiny(), torch.zeros(1, 6, 7, dtype=torch.int64)
    changed = torch.zeros(6, 7, 6, 7, dtype=torch.bool)  # of each code: the features that it changes
    with torch.no_grad():
        for row in range(6):
            for column in range(7):
                other = codes.clone()
                other[0, row, column] = 1
                changed[row, column] = ((prior.seen(other) - prior.seen(codes)).abs().amax(dim=(0, 1))) > 0
    for row in range(6):
        for column in range(7):
            expected = torch.zeros(6, 7, dtype=torch.bool)
            expected[row + 1 : row + 3, max(0, column - 2) : column + 3] = True
            expected[row, column + 1 : column + 3] = True
            assert torch.equal(changed[row, column], expected), (row, column)


def test_attention_is_over_what_comes_before():
    """Against the definition, position by position."""
    torch.manual_seed(0)
    attention = Attention(query_width=5, key_width=7, width=6, heads=2, dropout=0.0)
    queries, keys = torch.randn(2, 5, 3, 4), torch.randn(2, 7, 3, 4)
    q, k, v = (
        x.flatten(2).view(2, 2, 3, 12)  # b heads d n
        for x in (attention.query(queries), attention.key(keys), attention.value(keys))
    )
    expected = torch.zeros(2, 2, 3, 12)
    for position in range(1, 12):
        scores = torch.einsum("bhd,bhdn->bhn", q[..., position], k[..., :position]) / 3**0.5
        expected[..., position] = torch.einsum("bhn,bhdn->bhd", scores.softmax(-1), v[..., :position])
    torch.testing.assert_close(attention(queries, keys), expected.view(2, 6, 3, 4))


def test_attention_knows_codes_that_no_convolution_reaches():
    far = (5, 6)  # row and column of the last place; the first code is seven rows and columns away
    codes = torch.zeros(1, 6, 7, dtype=torch.int64)
    other = codes.clone()
    other[0, 0, 0] = 1
    for attention, reaches in ((True, True), (False, False)):
        prior = tiny(attention=attention, blocks=1, residual_blocks=1, kernel_size=3)
        with torch.no_grad():
            change = prior.logits((other,), Condition()) - prior.logits((codes,), Condition())
        assert bool(change.view(6, 7, -1)[far].abs().max() > 0) == reaches


@pytest.mark.parametrize("changes", [{}, {"attention": False}, {"kernel_size": 3}, {"kernel_size": 7}])
@pytest.mark.parametrize("output_blocks", [0, 2])
def test_stepper_and_logits_agree_for_each_option(changes, output_blocks):
    prior = tiny(output_blocks=output_blocks, **changes)
    codes = random_codes(3, prior)
    stepper, sequence = prior.stepper(3, Condition()), codes[0].flatten(1)
    steps = [stepper.next(sequence[:, n - 1 : n] if n else None) for n in range(42)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(steps, dim=1), prior.logits(codes, Condition()), rtol=0, atol=1e-5)


def test_an_image_costs_no_more_arithmetic_than_one_pass():
    prior = tiny_prior("pixelsnail", spec=tiny_spec(8, 8))
    codes, condition = random_codes(2, prior), condition_for(2, prior)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        prior.logits(codes, condition)
    with FlopCounterMode(display=False) as stepped:
        walk(prior.stepper(2, condition), 64, lambda position, logits: codes[0].flatten(1)[:, position : position + 1])
    assert stepped.get_total_flops() <= whole.get_total_flops()


def test_sampling_equals_the_naive_loop_code_for_code():
    prior = tiny_prior("pixelsnail", spec=tiny_spec(6, 7))
    condition, uniforms = labelled(5, prior), noise(0, range(5), 42)

    def choose(position: int, logits: Tensor) -> Tensor:
        return inverse_cdf(logits[:, 0].double().softmax(-1), uniforms[:, position])[:, None]

    naive = torch.zeros(5, 42, dtype=torch.int64)
    with torch.no_grad():
        for position in range(42):
            logits = prior.logits((naive.view(5, 6, 7),), condition)[:, position : position + 1]
            naive[:, position : position + 1] = choose(position, logits)
    assert torch.equal(walk(prior.stepper(5, condition), 42, choose), naive)
    assert len(naive.unique()) > 5


def test_dropout_also_falls_on_the_shares_of_attention():
    attention = Attention(query_width=4, key_width=4, width=4, heads=1, dropout=0.5)
    x = torch.randn(1, 4, 4, 4)
    assert torch.equal(attention.eval()(x, x), attention(x, x))
    assert not torch.equal(attention.train()(x, x), attention(x, x))


def test_classes_cost_nothing_where_there_are_none():
    assert not [name for name in tiny_prior("pixelsnail", num_classes=0).state_dict() if "classes" in name]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"blocks": 0}, "blocks=0, expected at least 1"),
        ({"residual_width": 0}, "residual_width=0, expected at least 1"),
        ({"output_blocks": -1}, "output_blocks=-1, expected 0 or more"),
        ({"kernel_size": 4}, "kernel_size=4, expected an odd number of at least 3"),
        ({"given_kernel_size": 2}, "given_kernel_size=2, expected an odd number of at least 1"),
        ({"width": 24, "heads": 8}, "width=24 with heads=8, expected a width that is a multiple of 16: the heads"),
        ({"dropout": 1.0}, "dropout=1.0, expected a share from 0 to below 1"),
    ],
)
def test_impossible_configs_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        PixelSNAILConfig(**setting)


def test_without_attention_any_width_will_do():
    assert PixelSNAILConfig(width=9, attention=False).width == 9
