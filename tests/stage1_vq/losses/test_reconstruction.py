"""The logit-Laplace likelihood: a slow formula, PyTorch's own distributions, and an integral of 1."""

from __future__ import annotations

import math

import pytest
import torch

from stage1_vq.losses.reconstruction import logit_laplace_bits, logit_laplace_nll, map_pixels, unmap_pixels


def test_pixels_are_mapped_as_published_and_back():
    images = torch.linspace(-1, 1, 256)
    torch.testing.assert_close(map_pixels(images), 0.8 * (images + 1) / 2 + 0.1)
    torch.testing.assert_close(unmap_pixels(map_pixels(images)), images)
    torch.testing.assert_close(unmap_pixels(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([-1.0, 0.0, 1.0]))


def test_the_likelihood_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    mean, log_scale, images = (torch.randn(3, 2, 3, 4, 4, generator=generator)).unbind()
    pixels = map_pixels(images.clamp(-1, 1))
    found = logit_laplace_nll(mean, log_scale, pixels)
    for place in [(0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 3)]:
        x, mu, b = pixels[place].item(), mean[place].item(), math.exp(log_scale[place].item())
        density = 1 / (2 * b * x * (1 - x)) * math.exp(-abs(math.log(x / (1 - x)) - mu) / b)
        assert found[place].item() == pytest.approx(-math.log(density), rel=1e-4, abs=1e-5)
    distribution = torch.distributions.TransformedDistribution(
        torch.distributions.Laplace(mean, log_scale.exp()), [torch.distributions.SigmoidTransform()]
    )
    torch.testing.assert_close(found, -distribution.log_prob(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("scale", [0.05, 0.4, 0.9])
def test_the_density_integrates_to_one(mean, scale):
    pixels = torch.linspace(-30, 30, 400_001, dtype=torch.float64).sigmoid()  # dense at both ends
    shape = torch.full_like(pixels, 1)
    density = (-logit_laplace_nll(mean * shape, math.log(scale) * shape, pixels)).exp()
    assert torch.trapezoid(density, pixels).item() == pytest.approx(1, abs=1e-4)


def test_black_and_white_pixels_have_finite_likelihoods_and_gradients():
    images = torch.tensor([-1.0, 1.0])
    mean, log_scale = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = logit_laplace_nll(mean, log_scale, map_pixels(images)).sum()
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(mean.grad, torch.tensor([1.0, -1.0]))  # towards black, and towards white
    assert log_scale.grad.isfinite().all()


@pytest.mark.parametrize("mean", [-8.0, -1.5, 0.0, 0.7, 2.6])
@pytest.mark.parametrize("scale", [0.01, 0.2, 3.0])
def test_the_256_values_of_a_pixel_have_probabilities_that_add_up_to_one(mean, scale):
    images = torch.arange(256) / 127.5 - 1
    shape = torch.ones(256)
    bits = logit_laplace_bits(mean * shape, math.log(scale) * shape, images)
    assert bits.isfinite().all()
    assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-9)


def test_the_bits_of_a_pixel_are_the_integral_over_its_bin():
    mean, scale, value = 0.4, 0.3, 150
    density = torch.distributions.Laplace(torch.tensor(mean).double(), torch.tensor(scale).double())
    low, high = (torch.tensor(0.8 * (value + side) / 255 + 0.1).double() for side in (-0.5, 0.5))
    expected = -(density.cdf(torch.logit(high)) - density.cdf(torch.logit(low))).log2()
    one = torch.ones(1)
    bits = logit_laplace_bits(mean * one, math.log(scale) * one, one * (value / 127.5 - 1))
    assert float(bits) == pytest.approx(float(expected), abs=1e-4)  # the arguments are float32
    # The density in the middle of the bin, times its width, is nearly the same.
    pixel = map_pixels(one * (value / 127.5 - 1))
    nats = logit_laplace_nll(mean * one, math.log(scale) * one, pixel) - math.log(0.8 / 255)
    assert float(nats) / math.log(2) == pytest.approx(float(bits), abs=0.01)
