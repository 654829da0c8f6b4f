"""What every masked prior owes, beyond what every prior does (test_conformance.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from codes.spec import Codes, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS
from stage2_prior.priors.base import NO_CODE
from stage2_prior.priors.masked import MaskedPrior, MaskedTransformer
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import (
    CLASSES,
    TINY,
    condition_for,
    labelled,
    random_codes,
    tiny_prior,
)

EVERY_MASKED_PRIOR = pytest.mark.parametrize("kind", [kind for kind in TINY if issubclass(PRIORS[kind], MaskedPrior)])


def half_hidden(prior: MaskedPrior, batch: int) -> tuple[Tensor, Tensor, Condition]:
    """A sequence, the same with about half of its codes hidden, and a condition."""
    condition = condition_for(batch, prior)
    sequence = prior.sequence(random_codes(batch, prior), condition)
    hidden = torch.rand(sequence.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return sequence, sequence.masked_fill(hidden, -1), condition


@EVERY_MASKED_PRIOR
def test_all_logits_depend_on_every_code_that_is_not_hidden(kind):
    prior = tiny_prior(kind)
    sequence, masked, condition = half_hidden(prior, 6)
    vocabularies = [grid.vocabulary for grid in prior.code_spec.grids for _ in range(grid.size)]
    with torch.no_grad():
        before = prior.masked_logits(masked, condition)
        for position, vocabulary in enumerate(vocabularies):
            other = masked.clone()
            other[:, position] = (sequence[:, position] + 1) % vocabulary
            change = (prior.masked_logits(other, condition) - before).abs().amax(dim=2)  # b n
            assert (change > 0).all()  # where the code was hidden, it is no longer


@EVERY_MASKED_PRIOR
def test_the_losses_of_hidden_codes_do_not_look_under_the_mask(kind):
    """Of each code, its nll changes with its own number only, though the sequence goes in with all of them."""
    prior = tiny_prior(kind)
    sequence, masked, condition = half_hidden(prior, 6)
    hidden = masked < 0
    with torch.no_grad():
        log_probabilities = prior.masked_logits(masked, condition).double().log_softmax(-1)
        nll = prior.hidden_nll(sequence, hidden, condition)
    expected = -log_probabilities.gather(-1, sequence[..., None])[..., 0] * hidden
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=1e-5)


@EVERY_MASKED_PRIOR
def test_numbers_that_are_no_codes_of_a_grid_are_never_drawn_at_any_temperature(kind):
    prior = tiny_prior(kind)
    for sampling in (SamplingConfig(temperature=1e6), SamplingConfig(temperature=1e6, guidance=2.0)):
        prior.code_spec.check(sample_codes(prior, range(50), labelled(50, prior), 0, sampling))
    with torch.no_grad():
        logits = prior.masked_logits(torch.full((2, prior.code_spec.codes_per_image), -1), labelled(2, prior))
    parts = logits.split([grid.size for grid in prior.code_spec.grids], dim=1)
    for grid, part in zip(prior.code_spec.grids, parts, strict=True):
        assert (part[..., grid.vocabulary :] == NO_CODE).all()
        assert (part[..., : grid.vocabulary] > NO_CODE / 2).all()


@EVERY_MASKED_PRIOR
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_known_codes_survive_and_the_others_do_not_depend_on_the_batch(kind, guidance):
    """Samples with few codes to draw beside samples with many."""
    prior, condition = tiny_prior(kind), labelled(12, tiny_prior(kind))
    sequence = prior.sequence(random_codes(12, prior), condition)
    number_known = torch.arange(12)[:, None] % (sequence.shape[1] + 1)  # none at all to all of them
    kept = torch.rand(sequence.shape, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) < number_known
    known = prior.grids_of(sequence.masked_fill(~kept, -1))
    sampling = SamplingConfig(steps=5, guidance=guidance, guidance_schedule="linear")
    together = sample_codes(prior, range(12), condition, 0, sampling, known)
    prior.code_spec.check(together)
    drawn = prior.sequence(together, condition)
    assert torch.equal(drawn[kept], sequence[kept])
    assert not torch.equal(drawn[~kept], sequence[~kept])
    for i in range(12):
        alone = sample_codes(
            prior, [i], Condition(condition.labels[i : i + 1]), 0, sampling, tuple(grid[i : i + 1] for grid in known)
        )
        assert torch.equal(prior.sequence(alone, Condition(condition.labels[i : i + 1]))[0], drawn[i])


@pytest.fixture
def passes_of(monkeypatch) -> Callable[..., list[int]]:
    """How many samples each pass of a masked prior had, while three were drawn."""

    def sample(prior: MaskedPrior, sampling: SamplingConfig, known: Codes | None = None) -> list[int]:
        passes, compute = [], prior.masked_logits

        def counted(sequence: Tensor, condition: Condition) -> Tensor:
            passes.append(len(sequence))
            return compute(sequence, condition)

        with monkeypatch.context() as patch:
            patch.setattr(prior, "masked_logits", counted)
            sample_codes(prior, range(3), labelled(3, prior), 0, sampling, known)
        return passes

    return sample


@EVERY_MASKED_PRIOR
def test_a_sample_takes_as_many_passes_as_steps_and_twice_as_many_with_guidance(kind, passes_of):
    prior = tiny_prior(kind)
    positions = prior.code_spec.codes_per_image * prior.parts_per_code
    for steps, expected in ((1, 1), (5, 5), (positions + 9, positions), (None, min(prior.sampling_steps, positions))):
        assert passes_of(prior, SamplingConfig(steps=steps)) == [3] * expected
        # At first nothing is known and nothing is asked: the null label of one sample is that of all.
        assert passes_of(prior, SamplingConfig(steps=steps, guidance=2.0)) == [3, 1, *[3, 3] * (expected - 1)]


@EVERY_MASKED_PRIOR
def test_steps_without_guidance_take_one_pass(kind, passes_of):
    sampling = SamplingConfig(steps=5, guidance=2.0, guidance_start=0.2, guidance_end=0.5)
    assert passes_of(tiny_prior(kind), sampling) == [3, 3, 3, 3, 3, 3, 3]  # two at the second and the third step
    assert passes_of(tiny_prior(kind), SamplingConfig(steps=2, guidance=2.0, guidance_schedule="linear")) == [3, 3, 3]


@EVERY_MASKED_PRIOR
def test_known_codes_are_seen_by_both_passes_and_all_known_take_none(kind, passes_of):
    prior = tiny_prior(kind)
    known = random_codes(3, prior)
    assert passes_of(prior, SamplingConfig(), known) == []  # nothing is left to draw
    known[0][0, 0, 0] = -1
    assert passes_of(prior, SamplingConfig(guidance=2.0), known) == [3, 3] * prior.parts_per_code


@EVERY_MASKED_PRIOR
def test_guidance_moves_masked_logits_by_its_formula(kind):
    """In one step and without noise in the choice all codes are drawn from the logits of an empty image."""
    prior, condition = tiny_prior(kind), labelled(6, tiny_prior(kind))
    empty = torch.full((6, prior.code_spec.codes_per_image), -1)
    with torch.no_grad():
        label, null = (prior.masked_logits(empty, c) for c in (condition, Condition(torch.full((6,), CLASSES))))

    def greedy(guidance: float) -> Tensor:
        sampling = SamplingConfig(temperature=0, guidance=guidance, steps=1)
        return prior.sequence(sample_codes(prior, range(6), condition, 0, sampling), condition)

    assert torch.equal(greedy(1.0), label.argmax(-1))
    assert torch.equal(greedy(3.0), (null + 3 * (label - null)).argmax(-1))
    assert torch.equal(greedy(0.0), null.argmax(-1))
    assert not torch.equal(greedy(1.0), greedy(3.0))


@EVERY_MASKED_PRIOR
def test_sampling_has_no_dropout_and_leaves_the_model_in_training(kind):
    prior = tiny_prior(kind)
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = sample_codes(prior, range(3), labelled(3, prior), 0, SamplingConfig())
    sampled = sample_codes(prior.train(), range(3), labelled(3, prior), 0, SamplingConfig())
    assert all(map(torch.equal, sampled, expected))
    assert prior.training


@EVERY_MASKED_PRIOR
def test_the_bound_on_the_nll_is_float32_and_the_same_in_any_batch(kind):
    prior = tiny_prior(kind)
    codes, condition = random_codes(5, prior), condition_for(5, prior)
    with torch.no_grad():
        nll = prior.nll(codes, condition)
        for i in range(5):
            alone = prior.nll(tuple(grid[i : i + 1] for grid in codes), Condition(condition.labels[i : i + 1]))
            torch.testing.assert_close(alone[0], nll[i], rtol=0, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert prior.nll(codes, condition).dtype == torch.float32
    assert nll.dtype == torch.float32
    assert nll.shape == (5, prior.code_spec.codes_per_image)


@pytest.mark.parametrize("kind", [kind for kind in TINY if issubclass(PRIORS[kind], MaskedTransformer)])
def test_given_codes_shape_all_logits_and_are_checked(kind):
    given = (Grid("top", 1, 2, 5), Grid("other", 2, 2, 3))
    prior = tiny_prior(kind, given=given)
    codes = tuple(torch.randint(grid.vocabulary, (4, grid.height, grid.width)) for grid in given)
    labels, empty = torch.arange(4), torch.full((4, prior.code_spec.codes_per_image), -1)
    with torch.no_grad():
        before = prior.masked_logits(empty, Condition(labels, codes))
        for number, grid in enumerate(given):
            for place in range(grid.size):
                other = [tensor.clone() for tensor in codes]
                flat = other[number].view(4, -1)
                flat[:, place] = (flat[:, place] + 1) % grid.vocabulary
                change = (prior.masked_logits(empty, Condition(labels, tuple(other))) - before).abs().amax(dim=2)
                assert (change > 0).all()
    samples = sample_codes(prior, range(4), Condition(labels, codes), 0, SamplingConfig(guidance=2.0))
    prior.code_spec.check(samples)
    with pytest.raises(UserError, match="got given codes of shapes"):
        prior.nll(samples, Condition(labels))
