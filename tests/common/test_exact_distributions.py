"""Distribution functions in exact arithmetic: they never fall, are close to what they stand for, and never change."""

from __future__ import annotations

import hashlib

import pytest
import torch

from common.exact_distributions import (
    SHARE_BITS,
    logistic,
    logistic_lines,
    normal,
    normal_lines,
    normal_quantiles,
)

CPU = torch.device("cpu")
DIGESTS = ["a633d7f0cb2a16f0", "d827ae838aeefb93", "3884587f735186bd", "7ddbdd16c40add3d"]


@pytest.mark.parametrize(
    ("function", "reference"), [(normal, torch.special.ndtr), (logistic, torch.sigmoid)], ids=["normal", "logistic"]
)
def test_shares_rise_from_0_to_1_and_are_close(function, reference):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, dtype=torch.float64, generator=generator) * 6
    line_ends = torch.arange(-4000, 4000, dtype=torch.float64) / 128
    x = torch.cat([x, line_ends, line_ends.nextafter(torch.tensor(99.0)), torch.tensor([-1e300, -30, 30, 1e300])])
    x = x.sort().values
    shares = function(x)
    assert bool((shares == shares.round()).all())
    assert bool((shares.diff() >= 0).all())
    assert float(shares[0]) == 0
    assert float(shares[-1]) == 2**SHARE_BITS
    assert float((shares / 2**SHARE_BITS - reference(x)).abs().max()) < 3e-6
    torch.testing.assert_close(function(x.view(2, -1)), shares.view(2, -1), rtol=0, atol=0)


def test_quantiles_are_the_inverse():
    edges, middles = normal_quantiles(10, CPU)
    parts = torch.arange(1024, dtype=torch.float64) * 2.0 ** (SHARE_BITS - 10)
    assert float((normal(edges) - parts)[1:].abs().max()) <= 1
    assert float((normal(middles) - parts - 2.0 ** (SHARE_BITS - 11)).abs().max()) <= 1
    assert bool((edges[1:] < middles[1:]).all())
    assert bool((middles[:-1] < edges[1:]).all())
    torch.testing.assert_close(middles, -middles.flip(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(middles, torch.special.ndtri((parts / 2**SHARE_BITS) + 1 / 2048), rtol=0, atol=1e-4)


def test_tables_are_those_of_all_files():
    """They are part of the format: other ones make files unreadable."""
    tables = [normal_lines(CPU).values, logistic_lines(CPU).values, *normal_quantiles(16, CPU)]
    digests = [hashlib.sha256(table.numpy().astype("<f8").tobytes()).hexdigest()[:16] for table in tables]
    assert digests == DIGESTS
