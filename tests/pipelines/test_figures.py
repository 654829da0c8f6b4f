"""Figures against their definitions and against what they estimate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipelines.figures import entropy, frequency_bits, ssim, standard_error, training_shares

N = 2 * 13 * 14
X = torch.sin(torch.arange(N).float()).view(1, 2, 13, 14)
Y = torch.cos(torch.arange(N).float() * 1.3).view(1, 2, 13, 14) * 0.5


@pytest.mark.parametrize(
    ("decoded", "original", "expected"),  # of torchmetrics 1.9.0, data_range=2.0
    [(X, Y, 0.0060182596), (X, 0.8 * X, 0.9590420723), (X, X.flip(-1), -0.0064913775), (X, X + 0.5 * Y, 0.7549231648)],
)
def test_ssim_is_that_of_torchmetrics(decoded, original, expected):
    (found,) = ssim(decoded, original.clamp(-1, 1)).tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_ssim_of_a_pixel_is_the_papers_formula_in_its_window():
    """An image of which one pixel differs, seen in the one window that does not reach beyond the border."""
    x, y = torch.zeros(1, 1, 11, 11), torch.zeros(1, 1, 11, 11)
    x[0, 0, 3, 4], y[0, 0, 3, 4], y[0, 0, 6, 6] = 0.8, 0.4, -0.5
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    padded = [np.pad(image[0, 0].double().numpy(), 5, mode="reflect") for image in (x, y)]
    total = 0.0
    for row in range(11):
        for column in range(11):
            a, b = (image[row : row + 11, column : column + 11] for image in padded)
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 0.02**2) / (mean_a**2 + mean_b**2 + 0.02**2)
            total += luminance * (2 * both + 0.06**2) / (var_a + var_b + 0.06**2)
    assert float(ssim(x, y)) == pytest.approx(total / 121, abs=1e-6)


def test_ssim_is_of_each_image_and_none_has_one_below_its_window():
    both = ssim(torch.cat([X, Y]), torch.cat([X, X]))
    assert both[0] == pytest.approx(1)
    assert torch.equal(both[1:], ssim(Y, X))
    assert ssim(X[..., :10, :], X[..., :10, :]) is None


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
