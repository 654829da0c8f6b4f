"""Densities against torch's, and draws against the distributions that they should have."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, StudentT

from stage1_vae.tables import likelihoods


def test_densities_are_those_of_torch():
    torch.manual_seed(0)
    values, mean, scale = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 3) + 0.2
    freedom = torch.rand(5, 3) * 20 + 3
    torch.testing.assert_close(
        likelihoods.Gaussian(mean, scale).log_density(values), Normal(mean, scale).log_prob(values)
    )
    found = likelihoods.StudentT(mean, scale, freedom).log_density(values)
    torch.testing.assert_close(found, StudentT(freedom, mean, scale).log_prob(values), rtol=1e-4, atol=1e-5)


SHARE_BELOW = {  # of Student's t in closed form, by its degrees of freedom
    1.0: lambda x: 0.5 + math.atan(x) / math.pi,
    2.0: lambda x: 0.5 + x / (2 * math.sqrt(2 + x * x)),
}


@pytest.mark.parametrize("freedom", SHARE_BELOW)
def test_student_draws_have_its_distribution(freedom: float):
    """By the shares below some values, where other distributions of the same spread differ by far more."""
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1)
    drawn = (likelihoods.StudentT(2 * one, 3 * one, freedom * one).draw(noise) - 2) / 3
    for value in (-4.0, -1.0, 0.3, 2.0):
        share = SHARE_BELOW[freedom](value)
        assert float((drawn < value).double().mean()) == pytest.approx(share, abs=4 * 0.5 / math.sqrt(1e5))


def test_student_draws_have_a_gradient_by_their_freedom():
    """E[x^2] = v / (v - 2), whose slope is -2 / (v - 2)^2."""
    noise = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    freedom = torch.tensor([9.0], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    likelihoods.StudentT(zero, one, freedom).draw(noise).square().mean().backward()
    assert freedom.grad is not None
    assert float(freedom.grad) == pytest.approx(-2 / 49, rel=0.05)
