"""The Halton order: complete on every grid, as published where that is, and evenly spread."""

from __future__ import annotations

import itertools

import pytest
import torch

from codes.spec import Grid
from stage2_prior.halton import halton_order, halton_ranks
from stage2_prior.masked_sampling import arccos_share, codes_per_step
from tests.golden import golden_frontier

LARGE = [(1, 128), (128, 1), (16, 32), (64, 64), (81, 128), (127, 113), (128, 128)]
GRIDS = [*itertools.product([1, 2, 3, 5, 8, 13], repeat=2), *LARGE]


def one_by_one(height: int, width: int) -> list[int]:
    """The places of the points of the sequence one after the other, in whole numbers, until there are no more."""

    def mirrored(number: int, base: int) -> tuple[int, int]:
        numerator, scale = 0, 1
        while number:
            number, digit = divmod(number, base)
            numerator, scale = numerator * base + digit, scale * base
        return numerator, scale

    places: dict[int, None] = {}
    for point in itertools.count(1):
        (row, rows), (column, columns) = mirrored(point, 2), mirrored(point, 3)
        places[row * height // rows * width + column * width // columns] = None
        if len(places) == height * width:
            return list(places)
    raise AssertionError


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_place_of_a_grid_comes_once(height, width):
    order = halton_order(height, width)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(height * width))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (3, 7), (9, 2), (16, 16)])
def test_places_come_with_the_first_point_that_falls_into_them(height, width):
    assert halton_order(height, width).tolist() == one_by_one(height, width)


def test_the_order_is_the_published_one_as_far_as_that_goes():
    outputs, complete = golden_frontier("halton_order").outputs, 0
    for size in (4, 8, 16, 24, 32, 64):
        published = outputs[f"order/{size}"]
        places = published[:, 0] * size + published[:, 1]
        assert torch.equal(halton_order(size, size)[: len(places)], places)
        complete += len(places) == size**2
    assert complete == 5  # of 64x64 it leaves out six


def test_steps_fill_as_many_as_published_but_for_rounding():
    """The published schedule rounds how many are filled down, from an arccosine in float32; here it is how many are
    hidden that are rounded down, as in MaskGIT: at most one code more is filled at a time."""
    outputs = golden_frontier("halton_order").outputs
    for name, published in outputs.items():
        if name.startswith("halton_per_step/"):
            size, steps = map(int, name.removeprefix("halton_per_step/").split("_"))
            ours = torch.tensor(codes_per_step(size**2, steps, arccos_share))
            apart = ours.cumsum(0) - published.cumsum(0)[: len(ours)]
            assert published.sum() == ours.sum() == size**2
            assert set(apart.tolist()) <= {0, 1}, name


def test_any_first_places_are_spread_evenly():
    """Each quarter of the grid has its share of them, which random ones have not."""

    def unevenness(order: torch.Tensor) -> float:
        worst = 0.0
        for count in (16, 64, 128, 300, 512):
            rows, columns = order[:count] // 32, order[:count] % 32
            quarters = torch.bincount(rows // 16 * 2 + columns // 16, minlength=4)
            worst = max(worst, float((quarters - count / 4).abs().max()))
        return worst

    assert unevenness(halton_order(32, 32)) <= 3
    assert unevenness(torch.randperm(1024, generator=torch.Generator().manual_seed(0))) > 3


def test_grids_come_one_after_the_other():
    grids = [Grid("top", 2, 3, 5), Grid("bottom", 4, 4, 5)]
    ranks = halton_ranks(grids)
    assert ranks[:6].argsort().tolist() == halton_order(2, 3).tolist()
    assert ranks[6:].argsort().tolist() == halton_order(4, 4).tolist()
    assert ranks[6:].min() == 6
    assert torch.equal(ranks.sort().values, torch.arange(22))
