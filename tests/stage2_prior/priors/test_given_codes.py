"""Given codes: the stack over them, and the priors of one grid that go by it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from codes.spec import Codes, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors import AutoregressivePrior
from stage2_prior.priors.given_codes import GivenCodes
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import CLASSES, random_codes, tiny_prior, tiny_spec

GRID = Grid("own", 6, 4, 11)
GIVEN = (Grid("top", 2, 4, 5), Grid("middle", 3, 2, 7), Grid("other", 6, 4, 3))  # ratios of 1, 2 and 3

EVERY_KIND = pytest.mark.parametrize("kind", ["pixelcnn", "pixelsnail"])


def random_given(batch: int, given: Sequence[Grid] = GIVEN) -> Codes:
    return tuple(torch.randint(grid.vocabulary, (batch, grid.height, grid.width)) for grid in given)


def prior_with_given(kind: str, num_classes: int = 0) -> AutoregressivePrior:
    return tiny_prior(kind, num_classes, tiny_spec(GRID.height, GRID.width), given=GIVEN)


def test_features_are_those_of_each_grid_repeated_and_concatenated():
    torch.manual_seed(0)
    stack, codes = GivenCodes(GIVEN, GRID, width=3, blocks=1), random_given(2)
    features = stack(codes)
    assert features.shape == (2, stack.width, 6, 4) == (2, 9, 6, 4)
    for number, grid in enumerate(GIVEN):
        own = GivenCodes([grid], GRID, width=3, blocks=1)
        own.stacks[0].load_state_dict(stack.stacks[number].state_dict())
        small = own.stacks[0](codes[number])
        rows, columns = 6 // grid.height, 4 // grid.width
        repeated = small.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        torch.testing.assert_close(features[:, 3 * number : 3 * number + 3], repeated)


def test_the_convolution_of_codes_is_that_of_their_one_hot_vectors():
    torch.manual_seed(0)
    convolution, (codes,) = GivenCodes(GIVEN[:1], GRID, width=3, blocks=0).stacks[0][0], random_given(2, GIVEN[:1])
    one_hot = F.one_hot(codes, 5).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(convolution(codes), F.conv2d(one_hot, convolution.weight(), convolution.bias, padding=1))


@EVERY_KIND
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_stepper_and_logits_agree(kind, num_classes):
    prior = prior_with_given(kind, num_classes).train()  # as it is made in the middle of training
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    codes, batch = random_codes(3, prior), 3
    condition = Condition(torch.arange(batch) if num_classes else None, random_given(batch))
    stepper = prior.stepper(batch, condition)
    assert prior.training
    sequence = prior.sequence(codes, condition)
    steps = [stepper.next(sequence[:, n - 1 : n] if n else None) for n in range(sequence.shape[1])]
    with torch.no_grad():
        expected = prior.eval().logits(codes, condition)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-5)


@EVERY_KIND
def test_sampling_equals_the_naive_loop(kind):
    prior, condition = prior_with_given(kind), Condition(codes=random_given(4))
    (sampled,) = sample_codes(prior, range(4), condition, 0, SamplingConfig(temperature=0))
    naive = torch.zeros(4, 24, dtype=torch.int64)
    with torch.no_grad():
        for position in range(24):
            naive[:, position] = prior.logits((naive.view(4, 6, 4),), condition)[:, position].argmax(-1)
    assert torch.equal(sampled.flatten(1), naive)


@EVERY_KIND
def test_another_given_code_changes_the_logits_of_all_that_it_reaches_from_the_first_on(kind):
    prior = prior_with_given(kind)
    codes, given = random_codes(2, prior), random_given(2)
    with torch.no_grad():
        before = prior.logits(codes, Condition(codes=given))
        for number, grid in enumerate(GIVEN):
            other = [one.clone() for one in given]
            other[number] = (other[number] + 1) % grid.vocabulary
            changes = (prior.logits(codes, Condition(codes=tuple(other))) - before).abs().amax(dim=(0, 2))
            assert (changes > 0).all()


@EVERY_KIND
def test_gradients_reach_the_stack(kind):
    prior = prior_with_given(kind).train()
    prior(random_codes(8, prior), Condition(codes=random_given(8))).loss.mean().backward()
    without = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert any(name.startswith("given_codes.") for name, _ in prior.named_parameters())


@EVERY_KIND
def test_given_codes_that_do_not_divide_the_grid_are_refused(kind):
    with pytest.raises(UserError, match=r"got given codes of 4x4 for a prior of 6x4 codes, expected sides that divide"):
        tiny_prior(kind, 0, tiny_spec(6, 4), given=[Grid("top", 4, 4, 5)])


@EVERY_KIND
def test_given_codes_are_asked_for(kind):
    prior = prior_with_given(kind)
    with pytest.raises(UserError, match=r"got given codes of shapes \[\], expected \[\(2, 2, 4\), "):
        prior.nll(random_codes(2, prior), Condition())
    with pytest.raises(UserError, match=r"got given codes of shapes \[\], expected \[\(2, 2, 4\), "):
        prior.stepper(2, Condition())


@EVERY_KIND
def test_without_given_codes_there_is_no_stack(kind):
    assert not [name for name in tiny_prior(kind).state_dict() if "given" in name]
