"""Precision, recall, density, coverage: torch-fidelity's numbers, the definitions by loops, copies far from zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from metrics import manifolds as module
from metrics.manifolds import density_coverage, manifolds, precision_recall, squared_distances


def sets(n: int = 90, m: int = 70, d: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(m, d) * 0.7 + 0.8


def by_loops(real: Tensor, made: Tensor, k: int) -> tuple[float, float, float, float]:
    """As the papers define them, one distance at a time."""
    real, made = real.double(), made.double()

    def radii(x: Tensor) -> list[float]:
        return [sorted(float((a - b).norm()) for j, b in enumerate(x) if j != i)[k - 1] + 1e-9 for i, a in enumerate(x)]

    def balls(points: Tensor, centres: Tensor, reach: list[float]) -> list[list[bool]]:
        return [[float((p - c).norm()) <= r for c, r in zip(centres, reach, strict=True)] for p in points]

    in_real, in_made = balls(made, real, radii(real)), balls(real, made, radii(made))
    precision = sum(any(row) for row in in_real) / len(made)
    recall = sum(any(row) for row in in_made) / len(real)
    density = sum(sum(row) for row in in_real) / (k * len(made))
    coverage = sum(any(column) for column in zip(*in_real, strict=True)) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("rows", [1024, 7])
def test_all_four_are_the_definitions(k: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS", rows)
    real, made = sets(40, 30)
    assert tuple(manifolds(real, made, k, k)) == pytest.approx(by_loops(real, made, k), abs=1e-6)


@pytest.mark.parametrize("k", [3, 4])
def test_precision_and_recall_are_those_of_torch_fidelity(k: int):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, made = sets(300, 200, 6)
    theirs = prc_features_to_metric(made, real, prc_neighborhood=k, verbose=False)
    assert precision_recall(real, made, k) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_one_pass_has_the_figures_of_both():
    real, made = sets()
    both = manifolds(real, made, 3, 5)
    assert (*precision_recall(real, made, 3), *density_coverage(real, made, 5)) == tuple(both)


def test_equal_distributions_have_the_expected_density_and_coverage():
    """Naeem et al. 2020: 1, and 1 - 2**-k."""
    torch.manual_seed(2)
    found = density_coverage(torch.randn(2000, 4), torch.randn(2000, 4), 5)
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_sets_that_are_apart_share_nothing_and_copies_everything():
    real, made = sets()
    assert manifolds(real, made + 1000) == (0, 0, 0, 0)
    copied = manifolds(real, real.flip(0), 3, 5)
    assert copied == pytest.approx((1, 1, 6 / 5, 1))  # in each ball lie its five neighbours and its own centre


def test_copies_are_found_far_from_zero_and_among_many():
    """There torch.cdist in float32 has copies 0.2 apart, and with them no copy lies in a ball of radius 0."""
    real = (torch.randn(60, 64) * 0.01 + 100).repeat(4, 1)  # of each image four, so that balls of k=3 have radius 0
    assert precision_recall(real, real[:60].repeat(4, 1), 3) == (1, 1)
    assert torch.cdist(real, real).diagonal().max() > 0.01
    distances = squared_distances(real.double(), real.double())
    assert (distances.reshape(4, 60, 4, 60).diagonal(dim1=1, dim2=3) == 0).all()


def test_one_far_image_makes_a_large_ball_in_recall_alone():
    """Made images of one spot and a single outlier: its ball holds real images, so recall counts them; coverage does
    not, because each real image asks for a made one nearby."""
    torch.manual_seed(0)
    real = torch.randn(500, 2)
    made = torch.cat([torch.full((499, 2), 9.0) + torch.randn(499, 2) * 1e-3, torch.tensor([[-9.0, -9.0]])])
    assert precision_recall(real, made).recall > 0.9
    assert density_coverage(real, made).coverage == 0


@pytest.mark.parametrize(("n", "m", "k"), [(3, 50, 3), (50, 3, 3), (50, 50, 0)])
def test_sets_without_neighbours_are_refused(n: int, m: int, k: int):
    with pytest.raises(UserError, match="expected at least 1, and more images than neighbours"):
        precision_recall(torch.randn(n, 2), torch.randn(m, 2), k)
    with pytest.raises(UserError, match="of one network"):
        precision_recall(torch.randn(n, 2), torch.randn(m, 3), k)


def test_features_that_are_no_numbers_are_refused():
    """Whatever is compared with them is false: all four would be 0."""
    with pytest.raises(UserError, match="some features are not finite"):
        precision_recall(torch.randn(9, 2), torch.full((9, 2), torch.nan))
