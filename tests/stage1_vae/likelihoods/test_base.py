from __future__ import annotations

import math

import torch

from stage1_vae.likelihoods import bits_per_dimension, dequantised


def test_bits_of_a_uniform_distribution_are_eight():
    dimensions = 12
    discrete = torch.tensor(dimensions * math.log(256))
    density = torch.tensor(dimensions * math.log(256 * 2 / 255))  # over the 256 levels, each 2/255 wide
    torch.testing.assert_close(bits_per_dimension(discrete, dimensions, True), torch.tensor(8.0))
    torch.testing.assert_close(bits_per_dimension(density, dimensions, False), torch.tensor(8.0))


def test_dequantised_bits_bound_what_a_density_says_of_levels():
    """Of a logistic variable: the mean over the noise is above -log2 of the mass of the bin, and near it."""
    level, mean, scale = torch.tensor(0.6, dtype=torch.float64), 0.55, 0.01

    def cdf(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((x - mean) / scale)

    exact = -(cdf(level + 1 / 255) - cdf(level - 1 / 255)).log2()
    x = dequantised(level.expand(200_000))
    assert (x - level).abs().max() <= 1 / 255
    assert (x - level).abs().max() > 0.99 / 255
    nats = -(cdf(x) * (1 - cdf(x)) / scale).log()
    bits = bits_per_dimension(nats, 1, discrete=False)
    error = bits.std() / len(bits) ** 0.5
    assert bits.mean() > exact - 4 * error
    assert bits.mean() < exact + 0.05
