from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.likelihoods.logistic_mixture import (
    HALF_BIN,
    Components,
    LogisticMixture,
    LogisticMixtureConfig,
    chosen,
    components_of,
    levels,
    log_bin,
    log_pixels,
    logistic,
    means_given,
    mixture_cdf,
)
from tests.golden import golden_vae

LEVELS = levels(torch.zeros((), dtype=torch.float64))  # 256


def likelihood(channels: int, components: int = 3, **changes: Any) -> LogisticMixture:
    return LogisticMixture(LogisticMixtureConfig(components=components, **changes), channels)


def outputs_of_pixels(channels: int, components: int, pixels: int, spread: float = 1.5) -> Tensor:
    """o 1 n, float64: means all over the range and beyond it, scales from tenths of a level to the whole range."""
    o = components * (10 if channels == 3 else 3)
    return torch.randn(o, 1, pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * spread


def pixel_probabilities(outputs: Tensor, channels: int, components: int, values: Tensor) -> Tensor:
    """p of pixels n c, as the definition says it, in float64: outputs n o -> n."""
    logits, rest = outputs[:, :components], outputs[:, components:].unflatten(1, (channels, -1, components))
    weights = logits.exp() / logits.exp().sum(1, keepdim=True)
    total = torch.ones_like(weights)
    for channel in range(channels):
        means = rest[:, channel, 0]
        if channels == 3 and channel:
            means = means + torch.tanh(rest[:, channel - 1, 2]) * values[:, :1]
        if channel == 2:
            means = means + torch.tanh(rest[:, 2, 2]) * values[:, 1:2]
        scales = rest[:, channel, 1].clamp(min=-7).exp()
        x = values[:, channel : channel + 1]
        above = torch.sigmoid((x + 1 / 255 - means) / scales)
        below = torch.sigmoid((x - 1 / 255 - means) / scales)
        above = torch.where(x > 0.999, torch.ones_like(above), above)
        below = torch.where(x < -0.999, torch.zeros_like(below), below)
        total = total * (above - below)
    return (weights * total).sum(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_log_prob_and_its_gradient_are_those_of_the_definition(channels: int):
    outputs = outputs_of_pixels(channels, 3, 200).requires_grad_()
    # values that are likely: far tails of the definition cancel
    images = likelihood(channels).sample(outputs.detach(), torch.Generator().manual_seed(0))
    expected = pixel_probabilities(outputs[:, 0].t(), channels, 3, images[:, 0].t()).log()
    found = likelihood(channels).log_prob(outputs, images)
    torch.testing.assert_close(found, expected.sum())
    slopes = torch.autograd.grad(expected.sum(), outputs)[0]
    torch.testing.assert_close(torch.autograd.grad(found, outputs)[0], slopes, rtol=1e-6, atol=1e-8)
    single = outputs.detach().float().requires_grad_()
    likelihood(channels).log_prob(single, images.float()).backward()
    torch.testing.assert_close(single.grad, slopes.float(), rtol=1e-4, atol=1e-4)


def test_leading_axes_broadcast():
    model = likelihood(3)
    outputs, images = torch.randn(5, 4, 30, 2, 3), torch.rand(4, 3, 2, 3) * 2 - 1
    found = model.log_prob(outputs, images)
    assert found.shape == (5, 4)
    torch.testing.assert_close(found[3, 2], model.log_prob(outputs[3, 2], images[2]))
    several = model.log_prob(outputs[0], torch.stack([images, -images]))
    torch.testing.assert_close(several[1], model.log_prob(outputs[0], -images))


def test_probabilities_of_grey_levels_add_up_to_one():
    outputs = outputs_of_pixels(1, 3, 50, spread=3)
    log_p = log_p_of_levels(likelihood(1), outputs)  # 256 n
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(50, dtype=torch.float64))
    edges = LEVELS[:, None, None] + HALF_BIN
    parts = likelihood(1).parts(outputs)
    below = mixture_cdf(edges, parts.log_weights, parts.means[0], parts.log_scales[0])[:, 0]
    torch.testing.assert_close(below[:-1], log_p.exp().cumsum(0)[:-1], rtol=1e-9, atol=1e-12)


def log_p_of_levels(model: LogisticMixture, outputs: Tensor) -> Tensor:
    """Of grey pixels, o 1 n: 256 n."""
    pixels = outputs[:, 0].t()[:, :, None, None]  # n o 1 1
    return model.log_prob(pixels, LEVELS[:, None, None, None, None])


def test_probabilities_of_colours_add_up_to_those_of_red():
    """Over all greens and blues; and the red ones are those of a grey pixel of red's parameters, which add up to 1."""
    outputs = outputs_of_pixels(3, 2, 1)
    red = torch.cat([outputs[:2], outputs[2:6]])
    expected = log_p_of_levels(likelihood(1, 2), red).exp()[:, 0]
    greens, blues = torch.meshgrid(LEVELS, LEVELS, indexing="ij")
    parts = likelihood(3, 2).parts(outputs)
    for level in (0, 1, 100, 190, 254, 255):
        images = torch.stack([torch.full_like(greens, LEVELS[level]), greens, blues])
        found = log_pixels(parts, images).exp().sum()
        torch.testing.assert_close(found, expected[level])


def test_mean_and_mode_of_grey_are_those_of_all_levels():
    outputs = outputs_of_pixels(1, 3, 60, spread=2)
    model = likelihood(1)
    p = log_p_of_levels(model, outputs).exp()
    torch.testing.assert_close(model.mean(outputs)[0, 0], (p * LEVELS[:, None]).sum(0))
    assert torch.equal(model.mode(outputs)[0, 0], LEVELS[p.argmax(0)])


def test_mode_of_colours_is_that_of_each_channel_in_turn():
    outputs = outputs_of_pixels(3, 2, 4)
    # The second component is the less likely one until the most likely red, which is its own, is known
    outputs[:, 0, 0] = torch.tensor([0.4, 0, 0.5, -0.5, -2, -5, 0, 0, *[0.5, -0.5, -4, -4, 0, 0] * 2])
    model = likelihood(3, 2)
    found = model.mode(outputs)[:, 0]  # 3 n
    for pixel in range(4):
        parts = outputs[:, 0, pixel]
        weights, rest = parts[:2].softmax(0), parts[2:].view(3, 3, 2)
        known: list[Tensor] = []
        for channel in range(3):
            means = rest[channel, 0].clone()
            for row, value in zip(((), (0,), (1, 2))[channel], known, strict=True):
                means += rest[row, 2].tanh() * value
            x = LEVELS[:, None]
            scales = rest[channel, 1].clamp(min=-7).exp()
            upper, lower = torch.sigmoid((x + 1 / 255 - means) / scales), torch.sigmoid((x - 1 / 255 - means) / scales)
            upper[-1], lower[0] = 1, 0
            joint = weights * (upper - lower)  # 256 m
            best = joint.sum(1).argmax()
            known.append(LEVELS[best])
            weights = joint[best]
        torch.testing.assert_close(found[:, pixel], torch.stack(known))


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_have_the_mean_that_is_told(channels: int):
    outputs = outputs_of_pixels(channels, 3, 8, spread=0.7)
    outputs[3:].view(channels, -1, 3, 8)[:, 1] -= 2
    model = likelihood(channels)
    draws = model.sample(outputs.expand(20_000, -1, -1, -1))
    error = 4 * draws.std(0) / len(draws) ** 0.5
    error[1:] += 0.03  # green and blue: wide components reach beyond black and white
    assert ((draws.mean(0) - model.mean(outputs)).abs() < error).all()


def test_mean_of_colours_inside_the_range():
    """Far from black and white the mean of blue is that of its logistic variable given the means of the others."""
    model = likelihood(3, 1)
    outputs = torch.tensor([0.0, 0.3, -4, 0.4, -0.2, -4, -0.3, 0.1, -4, 0.2], dtype=torch.float64)[:, None, None]
    c = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64).tanh()
    green = -0.2 + c[0] * 0.3
    expected = torch.stack([torch.tensor(0.3), green, 0.1 + c[1] * 0.3 + c[2] * green])
    torch.testing.assert_close(model.mean(outputs)[:, 0, 0], expected, rtol=0, atol=1e-5)


def test_draws_are_as_frequent_as_their_probability_says():
    count = 100_000
    grey = outputs_of_pixels(1, 3, 1)
    draws = likelihood(1).sample(grey.expand(count, -1, -1, -1))
    seen = torch.bincount(((draws.flatten() + 1) * 127.5).round().long(), minlength=256)
    check_frequencies(seen, log_p_of_levels(likelihood(1), grey).exp()[:, 0], count)

    colours = outputs_of_pixels(3, 2, 1) * 0.3
    colours[2:].view(3, 3, 2)[:, 1] = -5.5  # narrow enough that one colour comes again and again
    model = likelihood(3, 2)
    draws = model.sample(colours.expand(count, -1, -1, -1))[:, :, 0, 0]
    kinds, seen = draws.unique(dim=0, return_counts=True)
    p = model.log_prob(colours, kinds[:, :, None, None]).exp()
    assert (p * count > 20).sum() > 100
    check_frequencies(seen, p, count)


def check_frequencies(seen: Tensor, p: Tensor, count: int) -> None:
    """Of what is expected more than 20 times, within 4 standard errors, and of the rest together."""
    often = p * count > 20
    seen, p = (
        torch.cat([seen[often], seen[~often].sum()[None]]),
        torch.cat([p[often], (1 - p[often].sum()).clamp(min=0)[None]]),
    )
    error = (p * (1 - p) * count).sqrt()
    assert ((seen - p * count).abs() < 4 * error + 1e-6).all()


def exact_log_bin(x: float, mean: float, log_scale: float) -> Any:
    if x > mean:  # of the two sides the one whose numbers are small
        return exact_log_bin(-x, -mean, log_scale)
    scale, half = mpmath.exp(log_scale), mpmath.mpf(1) / 255

    def cdf(edge: Any) -> Any:
        return 1 / (1 + mpmath.exp(-(edge - mean) / scale))

    above = 1 if x > 0.999 else cdf(x + half)
    return mpmath.log(above - (0 if x < -0.999 else cdf(x - half)))


@pytest.mark.parametrize("x", [-1.0, -1 + 2 / 255, 0.25, 1 - 2 / 255, 1.0])
@pytest.mark.parametrize("mean", [-30.0, -0.9, 0.25, 0.9, 30.0])
@pytest.mark.parametrize("log_scale", [-7.0, -5.5, 0.0, 8.0, 40.0])
def test_tails_keep_their_digits(x: float, mean: float, log_scale: float):
    """In float32 and far below what a difference of two sigmoids can tell, with the gradient."""
    parameters = torch.tensor([mean, log_scale], dtype=torch.float32, requires_grad=True)
    x32 = torch.tensor(x)
    found = log_bin(x32, HALF_BIN, parameters[0], parameters[1], x32 < -0.999, x32 > 0.999)
    mean32, log_scale32 = parameters.detach().double().tolist()
    with mpmath.workdps(80):
        expected = exact_log_bin(x32.item(), mean32, log_scale32)
        slopes = [
            mpmath.diff(lambda value: exact_log_bin(x32.item(), value, log_scale32), mean32),
            mpmath.diff(lambda value: exact_log_bin(x32.item(), mean32, value), log_scale32),
        ]
    assert found.item() == pytest.approx(float(expected), rel=3e-5, abs=1e-6)
    gradient = torch.autograd.grad(found, parameters)[0]
    assert gradient.tolist() == pytest.approx([float(slope) for slope in slopes], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_extreme_numbers_stay_finite(channels: int):
    model = likelihood(channels)
    size = torch.tensor([-1e4, -300, -1, 0, 1, 300, 1e4])
    outputs = size[torch.randint(7, (400, model.outputs, 1, 1))].requires_grad_()
    images = torch.tensor([-1.0, -1 + 2 / 255, 0.2, 1 - 2 / 255, 1.0])[torch.randint(5, (400, channels, 1, 1))]
    log_p = model.log_prob(outputs, images)
    assert log_p.isfinite().all()
    assert (log_p <= 1e-5).all()
    assert torch.autograd.grad(log_p.sum(), outputs)[0].isfinite().all()
    for found in (model.mean(outputs.detach()), model.mode(outputs.detach()), model.sample(outputs.detach())):
        assert found.isfinite().all()
        assert (found.abs() <= 1 + 1e-6).all()


def test_fields_change_the_result_and_bad_ones_are_refused():
    outputs, images = torch.full((30, 1, 1), -8.0, dtype=torch.float64), torch.zeros(3, 1, 1)
    config = LogisticMixtureConfig(components=3)
    other = replace(config, smallest_log_scale=-6.0)
    assert likelihood(3).log_prob(outputs, images) != LogisticMixture(other, 3).log_prob(outputs, images)
    assert (likelihood(3).outputs, likelihood(3, 4).outputs, likelihood(1, 4).outputs) == (30, 40, 12)
    with pytest.raises(UserError, match=r"likelihood\.components=0, expected at least 1"):
        LogisticMixtureConfig(components=0)
    with pytest.raises(UserError, match=r"likelihood\.smallest_log_scale=-inf, expected a number"):
        LogisticMixtureConfig(smallest_log_scale=-math.inf)
    with pytest.raises(UserError, match=r"model\.channels=2, expected 1 \(grey\) or 3 \(RGB\)"):
        likelihood(2)


# ---- published implementations --------------------------------------------------------------------------------------


def published_log_p(parts: Components, images: Tensor, half_bin: float, log_width: float, white: float) -> Tensor:
    """As VD-VAE and NVAE approximate: of bins less likely than 1e-5 the density at their middle times a width, and
    levels above `white` reach up to infinity."""
    known = images.unsqueeze(-3)
    total = parts.log_weights
    for channel in range(3):
        means, log_scales = means_given(parts, channel, known), parts.log_scales.select(-4, channel)
        x = known.select(-4, channel)
        black_or_white = (x < -0.999, x > white)
        exact = log_bin(x, half_bin, means, log_scales, *black_or_white)
        middle = (x - means) * (-log_scales).exp()
        density = torch.nn.functional.logsigmoid(middle) + torch.nn.functional.logsigmoid(-middle) - log_scales
        unlikely = ~(black_or_white[0] | black_or_white[1]) & (exact < math.log(1e-5))
        total = total + torch.where(unlikely, density + log_width, exact)
    return total.logsumexp(dim=-3)


def published_sample(parts: Components, uniforms: Tensor, more: Tensor, temperature: float = 1.0) -> Tensor:
    """Without rounding, each channel clamped before the next; a temperature divides the scale, too."""
    component = chosen(parts.log_weights / temperature, uniforms)
    images = torch.zeros_like(more)
    for channel in range(3):
        means = (component * means_given(parts, channel, images.unsqueeze(-3))).sum(-3)
        log_scales = (component * parts.log_scales.select(-4, channel)).sum(-3) - math.log(temperature)
        images[..., channel, :, :] = logistic(means, log_scales, more[..., channel, :, :]).clamp(-1, 1)
    return images


@pytest.mark.parametrize(("bits", "half_bin", "width"), [("8bit", 1 / 255, 1 / 127.5), ("5bit", 1 / 31, 1 / 15.5)])
def test_vdvae(bits: str, half_bin: float, width: float):
    published = golden_vae("vdvae_dmol")
    images = published.inputs["x"].movedim(-1, 1).double()
    logits = published.inputs["logits"].movedim(-1, 1).double().requires_grad_()
    parts = components_of(logits, 3, published.config["num_mixtures"], -7.0)
    nll = -published_log_p(parts, images, half_bin, math.log(width), 0.999)
    published.check(f"{bits}/nll_per_pixel", nll)
    per_image = nll.mean(dim=(1, 2)) / 3
    published.check(f"{bits}/nll_per_image", per_image)
    gradient = torch.autograd.grad(per_image.sum(), logits)[0]
    published.check(f"{bits}/grad_logits", gradient.movedim(1, -1))


def test_vdvae_where_it_does_not_approximate():
    """Its bins that are likelier than 1e-5 are exact, and `log_prob` says the same of their pixels."""
    published = golden_vae("vdvae_dmol")
    model = likelihood(3, published.config["num_mixtures"])
    pixels = [published.inputs[name].flatten(0, 2)[..., None, None] for name in ("logits", "x")]
    found, expected = -model.log_prob(*pixels), published.outputs["8bit/nll_per_pixel"].flatten()
    likely = expected < -math.log(1e-5)
    assert likely.sum() > 5
    torch.testing.assert_close(found[likely], expected[likely], rtol=1e-5, atol=1e-3)


def test_vdvae_samples():
    published = golden_vae("vdvae_dmol")
    parts = components_of(published.inputs["logits"].movedim(-1, 1), 3, published.config["num_mixtures"], -7.0)
    found = published_sample(parts, *(published.inputs[name].movedim(-1, 1) for name in ("u0", "u1")))
    published.check("sample", found.movedim(1, -1))


@pytest.mark.parametrize("bits", [8, 5])
def test_nvae(bits: int):
    published = golden_vae("nvae_parts")
    inputs, mixtures, most = published.inputs, published.config["num_mix"], 2**bits - 1
    images = inputs[f"x{bits}"].double() * 2 - 1
    raw = inputs[f"mix_param{bits}"].double().requires_grad_()
    found = published_log_p(components_of(raw, 3, mixtures, -7.0), images, 1 / most, math.log(2 / most), 0.99)
    published.check(f"mix{bits}/log_prob", found)
    published.check(f"mix{bits}/grad", torch.autograd.grad(found.sum(), raw)[0])

    parts = components_of(inputs[f"mix_param{bits}"], 3, mixtures, -7.0)
    for place, temperature in enumerate((1.0, published.config["t"])):
        uniforms = [inputs[f"mix{bits}/u{2 * place + number}"] for number in (0, 1)]
        drawn = published_sample(parts, *uniforms, temperature) / 2 + 0.5
        published.check(f"mix{bits}/sample_t{temperature}", drawn)

    weights = parts.log_weights.exp()
    mixed = Components(  # of the published mean, which mixes first and applies the coefficients then
        torch.zeros_like(parts.log_weights[:, :1]),
        (weights[:, None] * parts.means).sum(-3, keepdim=True),
        parts.log_scales[:, :, :1],
        (weights[:, None] * parts.coefficients).sum(-3, keepdim=True),
    )
    mean = torch.zeros_like(mixed.means)
    for channel in range(3):
        mean[:, channel] = means_given(mixed, channel, mean).clamp(-1, 1)
    published.check(f"mix{bits}/mean", mean[:, :, 0] / 2 + 0.5)
