"""Figures against their definitions and against what they estimate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipelines.figures import entropy, frequency_bits, standard_error, training_shares


def test_training_shares_are_a_distribution_that_rules_nothing_out():
    for counts in ([4, 0, 2, 2], [1, 1, 1, 0], [3, 5], [0, 0, 7], [1, 0, 0], [0, 0]):
        shares = training_shares(torch.tensor(counts))
        assert float(shares.sum()) == pytest.approx(1)
        assert (shares > 0).all()
        order = torch.tensor(counts).argsort()
        assert (shares[order].diff() >= 0).all()
    assert training_shares(torch.tensor([3, 5])).tolist() == [3 / 8, 5 / 8]
    torch.testing.assert_close(
        training_shares(torch.tensor([4, 0, 2, 2])), torch.tensor([4, 0.5, 2, 2], dtype=torch.float64) / 8.5
    )
    large = training_shares(
        torch.tensor([9, *[0] * 1000])
    )  # 1000 codes that never occurred count for half an occurrence
    assert float(large[0]) == pytest.approx(9 / 9.5)


def codes_of(count: int, vocabulary: int = 256, seed: int = 0) -> tuple[torch.Tensor, float]:
    """Counts of so many codes drawn from probabilities that fall as 1 / (rank + 10), and the entropy of these."""
    shares = 1 / (torch.arange(vocabulary, dtype=torch.float64) + 10)
    shares /= shares.sum()
    drawn = torch.multinomial(shares, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    return drawn.bincount(minlength=vocabulary), float(-(shares * shares.log2()).sum())


def test_few_codes_need_what_training_frequencies_say_not_what_their_own_do():
    """384 codes, as 24 images of 4x4 have: their own frequencies fit them best."""
    training, true = codes_of(100_000, seed=1)
    few = [codes_of(384, seed=seed)[0] for seed in range(2, 22)]
    shares = [counts[counts > 0].double() / counts.sum() for counts in few]
    own = [float(-(share * share.log2()).sum()) for share in shares]
    by_training = [frequency_bits(counts, training) for counts in few]
    assert np.mean(own) < true - 0.4
    assert np.mean(by_training) == pytest.approx(true, abs=0.05)
    # An estimate from the few alone is nearer than they are, and does not reach it.
    estimated = np.mean([entropy(counts) for counts in few])
    assert np.mean(own) + 0.2 < estimated < true + 0.1
    many, _ = codes_of(200_000, seed=3)
    assert entropy(many) == pytest.approx(true, abs=0.01)


def test_a_code_that_training_never_showed_costs_bits_and_not_infinitely_many():
    training = torch.tensor([50, 50, 0, 0])
    assert frequency_bits(torch.tensor([1, 1, 0, 0]), training) == pytest.approx(-math.log2(50 / 101))
    assert frequency_bits(torch.tensor([0, 0, 3, 0]), training) == pytest.approx(-math.log2(0.5 / 101))


def test_entropy_has_the_correction_for_few_codes_and_stays_below_log2_k():
    assert entropy(torch.tensor([4, 0, 2, 2])) == pytest.approx(1.5 + 2 / (2 * math.log(2) * 8))
    assert entropy(torch.tensor([1, 1, 1, 1])) == 2


def test_the_standard_error_is_that_of_a_mean():
    assert standard_error(torch.tensor([1.0, 3.0, 2.0, 2.0])) == pytest.approx(math.sqrt(2 / 3) / 2)
    assert standard_error(torch.tensor([1.0])) == math.inf
