"""The kernel distance: torch-fidelity's numbers, the definition term by term, and no bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from metrics import kernel
from metrics.kernel import kernel_distance, kernel_distance_of_all


def sets(n: int = 150, m: int = 170, d: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(m, d) * 1.2 + 0.2


@pytest.mark.parametrize("seed", [2020, 3])
def test_it_is_that_of_torch_fidelity_with_the_same_seed(seed: int):
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = sets()
    theirs = kid_features_to_metric(x, y, kid_subsets=8, kid_subset_size=60, rng_seed=seed, verbose=False)
    found = kernel_distance(x, y, subsets=8, subset_size=60, seed=seed)
    assert found.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert found.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)


def test_all_pairs_are_the_definition(monkeypatch: pytest.MonkeyPatch):
    x, y = sets(7, 9, 4)

    def k(one: Tensor, other: Tensor) -> float:
        return (float(one.double() @ other.double()) / 4 + 1) ** 3

    within = [sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) for s in (x, y)]
    between = sum(k(a, b) for a in x for b in y)
    expected = within[0] / (7 * 6) + within[1] / (9 * 8) - 2 * between / (7 * 9)
    assert kernel_distance_of_all(x, y) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(kernel, "ROWS", 4)  # blocks of rows that do not divide the sets
    assert kernel_distance_of_all(x, y) == pytest.approx(expected, rel=1e-12)


def test_subsets_of_the_whole_sets_are_all_pairs():
    x, y = sets(30, 30)
    found = kernel_distance(x, y, subsets=3, subset_size=30)
    assert found.mean == pytest.approx(kernel_distance_of_all(x, y), rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_a_small_set_is_not_biased():
    """Of Gaussians with covariances I and sI and equal means, E k = E (x.y/d + 1)**3 = 1 + 3 E (x.y)**2 / d**2, and
    E (x.y)**2 = d, d s and d s s: the distance is 3 (1 - s)**2 / d."""
    torch.manual_seed(1)
    d, s = 8, 2.0
    expected = 3 * (1 - s) ** 2 / d
    found = [kernel_distance_of_all(torch.randn(20, d), torch.randn(20, d) * s**0.5) for _ in range(500)]
    assert torch.tensor(found).mean() == pytest.approx(expected, abs=0.04)


def test_float32_features_far_from_zero_keep_their_digits():
    """Products of float32 would leave rounding of 1e-7 of a kernel of 1e9."""
    x, y = sets()
    x, y = x.round() + 1000, y.round() + 1000
    assert kernel_distance_of_all(x, y) == kernel_distance_of_all(x.double(), y.double())


@pytest.mark.parametrize(("subsets", "size"), [(0, 10), (5, 1), (5, 151)])
def test_subsets_that_cannot_be_drawn_are_refused(subsets: int, size: int):
    with pytest.raises(UserError, match="expected at least one subset, of 2 to 150"):
        kernel_distance(*sets(), subsets=subsets, subset_size=size)


def test_features_of_different_networks_are_refused():
    with pytest.raises(UserError, match="of one network"):
        kernel_distance_of_all(torch.zeros(9, 4), torch.zeros(9, 5))


def test_features_that_are_no_numbers_are_refused():
    broken = torch.full((9, 4), torch.nan)
    with pytest.raises(UserError, match="some features are not finite"):
        kernel_distance(torch.zeros(9, 4), broken, subsets=2, subset_size=3)
