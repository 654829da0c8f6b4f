"""Filling in hidden codes: schedules, which codes a step keeps, and what the samples are distributed like."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from stage2_prior.condition import Condition
from stage2_prior.drawing import inverse_cdf, noise
from stage2_prior.masked_sampling import (
    InOrder,
    SurestFirst,
    codes_per_step,
    cosine_share,
    first_places,
    linear_share,
    padded,
    unmask,
)
from stage2_prior.priors import MaskedPrior, MaskGIT, MaskGITConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import labelled, tiny_prior, tiny_spec


@pytest.mark.parametrize("share", [cosine_share, linear_share])
def test_the_steps_fill_all_codes_and_each_at_least_one(share):
    for hidden in [*range(33), 64, 100, 256, 1024]:
        for steps in [*range(1, 40), 64, 500, 2000]:
            counts = codes_per_step(hidden, steps, share)
            assert len(counts) == min(steps, hidden)
            assert sum(counts) == hidden
            assert min(counts, default=1) >= 1


def test_twelve_steps_of_256_codes_are_those_of_the_paper():
    left = 256 - torch.tensor(codes_per_step(256, 12, cosine_share)).cumsum(0)
    assert left.tolist() == [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0]
    assert codes_per_step(256, 8, linear_share) == [32] * 8


def some_logits(batch: int, positions: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(batch, positions, 5, generator=torch.Generator().manual_seed(seed))


def by_inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    return inverse_cdf(logits.double().softmax(-1).flatten(0, 1), uniforms.flatten()).view(uniforms.shape)


def fresh_logits(step: int, sequence: Tensor) -> Tensor:
    """Of each step others, which depend on what is filled in."""
    return some_logits(*sequence.shape, seed=step) + 0.3 * sequence.sum(1)[:, None, None] * torch.arange(5).cos()


def surest_first_one_by_one(
    row: Tensor, counts: list[int], uniforms: Tensor, noise: Tensor, temperature: float
) -> Tensor:
    """The published algorithm for one sample: n, steps n, steps n -> n."""
    row = row.clone()
    for step, count in enumerate(counts):
        logits = fresh_logits(step, row[None])[0]
        scores = {}
        for place in range(len(row)):
            if row[place] < 0:
                code = int(by_inverse_cdf(logits[None, place : place + 1], uniforms[step, place].view(1, 1)))
                gumbel = -math.log(-math.log(noise[step, place]))
                left = 1 - (step + 1) / len(counts)
                scores[place] = (float(logits[place].log_softmax(-1)[code]) + temperature * left * gumbel, code)
        for place in sorted(scores, key=lambda place: -scores[place][0])[:count]:
            row[place] = scores[place][1]
    return row


@pytest.mark.parametrize("temperature", [0.0, 4.5])
def test_the_surest_codes_are_kept_as_in_a_loop_over_single_codes(temperature):
    positions, steps = 11, 4
    start = torch.full((3, positions), -1)
    start[1, ::2] = 3  # five codes left to draw
    start[2, :9] = 1  # two: two steps
    counts = [codes_per_step(int((row < 0).sum()), steps, cosine_share) for row in start]
    assert [len(row) for row in counts] == [4, 4, 2]
    uniforms, choice = (
        noise(0, range(3), steps * positions, stream).unflatten(1, (steps, positions)) for stream in (0, 2)
    )

    def logits_of(step: int, sequence: Tensor) -> Tensor:
        return torch.cat([fresh_logits(step, row[None]) for row in sequence])

    filled = unmask(start, steps, logits_of, SurestFirst(counts, uniforms, choice, temperature, by_inverse_cdf))
    assert (filled >= 0).all()
    for i in range(3):
        expected = surest_first_one_by_one(start[i], counts[i], uniforms[i], choice[i], temperature)
        assert torch.equal(filled[i], expected)


def test_in_random_order_every_place_is_as_likely_at_every_step():
    count, positions = 1000, 6
    start = torch.full((count, positions), -1)
    start[:, 1] = 2
    counts = [codes_per_step(5, 3, linear_share)] * count
    uniforms, order = (noise(0, range(count), positions, stream) for stream in (0, 2))
    fill, seen, filled_at = InOrder(counts, uniforms, order, start >= 0, by_inverse_cdf), [], []

    def logits_of(step: int, sequence: Tensor) -> Tensor:
        seen.append(sequence)
        return some_logits(1, positions).expand(count, -1, -1)

    end = unmask(start, 3, logits_of, fill)
    for before, after, number in zip(seen, [*seen[1:], end], counts[0], strict=True):
        filled_at.append((before < 0) & (after >= 0))
        assert (filled_at[-1].sum(1) == number).all()
        assert torch.equal(before[before >= 0], after[before >= 0])
    assert (end[:, 1] == 2).all()
    frequencies = torch.stack(filled_at).double().mean(1)  # step n
    hidden = [0, 2, 3, 4, 5]
    expected = torch.tensor(counts[0]).double()[:, None].expand(-1, 5) / 5
    torch.testing.assert_close(frequencies[:, hidden], expected, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        ("diffusion", SamplingConfig(steps=3)),
        ("maskgit", SamplingConfig(steps=3, choice_temperature=1e9)),  # so hot that the order is random
    ],
)
def test_one_code_at_a_time_in_random_order_the_prior_is_the_mixture_of_its_orders(kind, sampling):
    prior = tiny_prior(kind, 0, tiny_spec(1, 3, 2), noise=0.4)
    grids = torch.tensor(list(itertools.product(range(2), repeat=3)))
    expected = 2000 * mixture_of_orders(prior, grids)
    samples = sample_codes(prior, range(2000), Condition(), 3, sampling)[0].flatten(1)
    counts = torch.stack([(samples == grid).all(1).sum() for grid in grids])
    torch.testing.assert_close(expected.sum(), torch.tensor(2000.0, dtype=torch.float64))
    assert (expected / 250 - 1).abs().max() > 0.5  # far from uniform
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 7 degrees of freedom: 1 in 1,000 chance of error


def mixture_of_orders(prior: MaskedPrior, sequences: Tensor) -> Tensor:
    """The probability of each sequence, `b` float64, when codes are drawn one by one in an order drawn by lot."""
    total = torch.zeros(len(sequences), dtype=torch.float64)
    orders = list(itertools.permutations(range(sequences.shape[1])))
    for order in orders:
        row, log_probability = torch.full_like(sequences, -1), torch.zeros_like(total)
        for place in order:
            with torch.no_grad():
                log_shares = prior.masked_logits(row, Condition())[:, place].double().log_softmax(-1)
            log_probability += log_shares.gather(1, sequences[:, place, None])[:, 0]
            row[:, place] = sequences[:, place]
        total += log_probability.exp() / len(orders)
    return total


def test_without_chance_in_the_choice_maskgit_keeps_other_codes_than_with_it():
    prior = tiny_prior("maskgit")
    cold, usual, default = (
        prior.sequence(sample_codes(prior, range(6), labelled(6, prior), 0, sampling), labelled(6, prior))
        for sampling in (SamplingConfig(choice_temperature=0), SamplingConfig(choice_temperature=4.5), SamplingConfig())
    )
    assert torch.equal(usual, default)
    assert not torch.equal(cold, usual)


def test_first_places_come_in_order_and_others_fill_up():
    wanted = torch.tensor([[False, True, True, False], [False, False, False, True]])
    places = first_places(wanted, 2)
    assert places[0].tolist() == [1, 2]
    assert places[1, 0] == 3
    assert not wanted[1, places[1, 1]]


def test_rows_are_padded_with_zeros():
    assert padded([[3, 2], [1], []]).tolist() == [[3, 2], [1, 0], [0, 0]]


class FromTheLeft(MaskGIT):
    """A kind that sampling.py has never heard of: fills in its codes from the left, and notes what it is asked
    with."""

    sampling_steps = 3
    choice_temperature = 0.25
    asked: ClassVar[list[float | None]] = []

    def hidden_share(self, progress: float) -> float:
        return (1 - progress) ** 2

    def filling(self, counts, known, uniforms, draw, choice_temperature):
        self.asked.append(choice_temperature)
        places = torch.arange(known.shape[1], dtype=torch.float64) / known.shape[1]
        return InOrder(counts, uniforms(known.shape[1], 0), places.expand(len(known), -1), known, draw)


def test_a_new_masked_prior_says_itself_how_it_is_sampled(monkeypatch):
    prior = FromTheLeft(MaskGITConfig(layers=1, width=16, heads=2), tiny_spec(1, 9, 5), 0).eval()
    seen, compute = [], prior.masked_logits

    def noted(sequence: Tensor, condition: Condition) -> Tensor:
        seen.append((sequence[0] >= 0).tolist())
        return compute(sequence, condition)

    monkeypatch.setattr(prior, "masked_logits", noted)
    sample_codes(prior, range(2), Condition(), 0, SamplingConfig())
    assert seen == [[place < filled for place in range(9)] for filled in (0, 5, 8)]  # 9, 4 and 1 of 9 are hidden
    sample_codes(prior, range(2), Condition(), 0, SamplingConfig(steps=1, choice_temperature=2.0))
    assert len(seen) == 4
    assert prior.asked == [0.25, 2.0]
