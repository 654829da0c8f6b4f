"""Discretised mixture of logistics of Salimans et al. 2017, "PixelCNN++" (arXiv:1701.05517), as Child 2020 (VD-VAE,
arXiv:2011.10650) has it, too.

A pixel is of one of m components, all its channels of the same. Given the component a channel is a logistic variable,
rounded to the nearest of the 256 levels of [-1, 1]; the first and the last level take all that lies beyond them. Of
three channels the mean of green depends on what red is, and that of blue on both, linearly.

Parameters of components, in all functions here: log-weights `... m H W`, means and log-scales `... m H W` of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from stage1_vae.likelihoods.base import Likelihood, at_least_float

HALF_BIN = 1 / 255  # half the distance of two levels
LEVELS = 256
NUMBERS_AT_ONCE = 2**20  # of means and levels together


@dataclass(frozen=True, kw_only=True)
class LogisticMixtureConfig:
    """8-bit images, grey or RGB, as a mixture of rounded logistics in each pixel."""

    kind: Literal["logistic_mixture"] = "logistic_mixture"
    components: int = 10  # m
    smallest_log_scale: float = -7.0  # log-scales below it are taken for it

    def __post_init__(self) -> None:
        if self.components < 1:
            raise UserError(f"likelihood.components={self.components}, expected at least 1")
        if not math.isfinite(self.smallest_log_scale):
            raise UserError(f"likelihood.smallest_log_scale={self.smallest_log_scale}, expected a number such as -7")


class Components(NamedTuple):
    log_weights: Tensor  # ... m H W, their exponentials add up to 1
    means: Tensor  # ... c m H W: of green where red is 0, of blue where red and green are 0
    log_scales: Tensor  # ... c m H W
    coefficients: Tensor | None  # ... 3 m H W, of three channels: green's for red, blue's for red, blue's for green


def components_of(outputs: Tensor, channels: int, components: int, smallest_log_scale: float) -> Components:
    """What a network says, `... o H W`: m logits of the components, then of each channel their m means, m log-scales
    and, of three channels, m coefficients before tanh."""
    logits, rest = outputs.split([components, outputs.shape[-3] - components], dim=-3)
    parts = rest.unflatten(-3, (channels, -1, components)).unbind(-4)  # each ... c m H W
    coefficients = parts[2].tanh() if channels == 3 else None
    return Components(logits.log_softmax(dim=-3), parts[0], parts[1].clamp(min=smallest_log_scale), coefficients)


def means_given(parts: Components, channel: int, known: Tensor) -> Tensor:
    """Means of one channel, `... m H W`, given those before it. known: `... c m H W`, or `... c 1 H W` where it is the
    same of all components; what stands in this channel and behind it is not read."""
    means = parts.means.select(-4, channel)
    if channel == 0 or parts.coefficients is None:
        return means
    means = means + parts.coefficients.select(-4, channel - 1) * known.select(-4, 0)
    return means if channel == 1 else means + parts.coefficients.select(-4, 2) * known.select(-4, 1)


def cdf(edges: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """How likely the logistic variable lies below edges, which broadcast against the parameters."""
    return ((edges - means) * (-log_scales).exp()).sigmoid()


def mixture_cdf(edges: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """How likely a channel of a pixel lies below edges `... H W`: `... H W`. Between two levels that is how likely it
    is one of the levels below."""
    return (log_weights.exp() * cdf(edges.unsqueeze(-3), means, log_scales)).sum(dim=-3)


def log_bin(
    centres: Tensor, half_width: float, means: Tensor, log_scales: Tensor, open_below: Tensor, open_above: Tensor
) -> Tensor:
    """log of how likely the logistic variable lies within half_width of the centre, or anywhere below its upper edge,
    or above its lower edge, where the masks say so.

    With a and b the upper and the lower edge in units of the scale, sigmoid(a) - sigmoid(b) is sigmoid(a) sigmoid(-b)
    (1 - exp(b - a)), a product whose logarithm loses no digits.
    """
    inverse_scales = (-log_scales).exp()
    middle = (centres - means) * inverse_scales
    half = half_width * inverse_scales
    log_below, log_above = F.logsigmoid(middle + half), F.logsigmoid(half - middle)
    # log(1 - exp(-2 half)) as the log of 2 half, which a tiny half does not round to 0, plus the log of what is left
    width = 2 * half
    large = width.clamp(min=0.01)
    left = torch.where(width < 0.01, width.square() / 24 - width / 2, (-torch.expm1(-large) / large).log())
    log_inside = log_below + log_above + (math.log(2 * half_width) - log_scales) + left
    return torch.where(open_below, log_below, torch.where(open_above, log_above, log_inside))


def log_level(values: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log of how likely a channel is one of the 256 levels, given the component: `... m H W`. values: `... 1 H W`."""
    ends = 1 - HALF_BIN
    return log_bin(values, HALF_BIN, means, log_scales, values < -ends, values > ends)


def log_pixels(parts: Components, images: Tensor) -> Tensor:
    """log p of each pixel, all its channels together: images `... c H W` -> `... H W`."""
    known = images.unsqueeze(-3)
    log_weights = parts.log_weights
    for channel in range(images.shape[-3]):
        means, log_scales = means_given(parts, channel, known), parts.log_scales.select(-4, channel)
        log_weights = log_weights + log_level(known.select(-4, channel), means, log_scales)
    return log_weights.logsumexp(dim=-3)


def mean_of_levels(means: Tensor, log_scales: Tensor) -> Tensor:
    """Of a channel given the component, `... m H W`: -1, plus the distance of two levels for each edge between two of
    them, as often as it lies above."""
    above = torch.zeros_like(means)
    for some in levels_at_a_time(means):
        # above white there is no edge
        above = above + torch.where(some < 1, cdf(-some - HALF_BIN, -means, log_scales), 0.0).sum(dim=0)
    return above * (2 * HALF_BIN) - 1


def most_likely_level(log_weights: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Of a channel, `... H W`; of several alike the lowest."""
    best = torch.full_like(log_weights.select(-3, 0), -math.inf)
    values = torch.zeros_like(best)
    for some in levels_at_a_time(means):
        found, place = (log_weights + log_level(some, means, log_scales)).logsumexp(dim=-3).max(dim=0)
        values = torch.where(found > best, some.flatten()[place], values)
        best = torch.maximum(found, best)
    return values


def levels_at_a_time(means: Tensor) -> Iterator[Tensor]:
    """The 256 levels, a few at a time, on an axis before those of the means: all in one go for a pixel or two, one by
    one of many images."""
    count = max(1, min(LEVELS, NUMBERS_AT_ONCE // means.numel()))
    yield from levels(means).view(-1, *(1 for _ in means.shape)).split(count)


def levels(like: Tensor) -> Tensor:
    """The 256 numbers that 8-bit values are in [-1, 1], of the type and device of `like`."""
    return torch.arange(LEVELS, dtype=like.dtype, device=like.device) / 127.5 - 1


def chosen(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """One component of each pixel as one-hot numbers, `... m H W`, by the largest of the log-weights plus Gumbel noise.
    uniforms: in (0, 1), `... m H W`."""
    scores = log_weights - (-uniforms.log()).log()
    return F.one_hot(scores.argmax(dim=-3), scores.shape[-3]).movedim(-1, -3).to(log_weights.dtype)


def logistic(means: Tensor, log_scales: Tensor, uniforms: Tensor) -> Tensor:
    """The logistic variable that lies below what it is here as often as uniforms, in (0, 1), say."""
    return means + log_scales.exp() * (uniforms.log() - (-uniforms).log1p())


def to_levels(values: Tensor) -> Tensor:
    """The nearest of the 256 levels."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class LogisticMixture(Likelihood):
    """The network puts out the logits of m components, then of each channel m means, m log-scales and, of three
    channels, m coefficients. Pixels are levels of 8-bit images; others are taken as they are, and then probabilities do
    not add up to 1."""

    discrete = True
    config: LogisticMixtureConfig

    def __init__(self, config: LogisticMixtureConfig, channels: int) -> None:
        super().__init__(config, channels)
        if channels not in (1, 3):
            raise UserError(f"model.channels={channels}, expected 1 (grey) or 3 (RGB) of a mixture of logistics")
        self.outputs = config.components * (10 if channels == 3 else 3)

    def parts(self, outputs: Tensor) -> Components:
        outputs = at_least_float(outputs)
        return components_of(outputs, self.channels, self.config.components, self.config.smallest_log_scale)

    def log_prob(self, outputs: Tensor, images: Tensor, seen: Tensor | None = None) -> Tensor:
        of_pixels = log_pixels(self.parts(outputs), images)
        return (of_pixels if seen is None else of_pixels * seen.squeeze(-3)).sum(dim=(-2, -1))

    def mean(self, outputs: Tensor) -> Tensor:
        """Exact of grey and of red. Of green and blue it is, of each component, the mean given the means of the
        channels before, which differs where that reaches beyond black or white, and by at most a level elsewhere."""
        parts = self.parts(outputs)
        means = torch.zeros_like(parts.means)
        for channel in range(self.channels):
            given = means_given(parts, channel, means)
            means.select(-4, channel).copy_(mean_of_levels(given, parts.log_scales.select(-4, channel)))
        return (parts.log_weights.exp().unsqueeze(-4) * means).sum(dim=-3)

    def mode(self, outputs: Tensor) -> Tensor:
        """Of three channels: the most likely red, then the most likely green given red, then blue given both."""
        parts = self.parts(outputs)
        log_weights = parts.log_weights
        images = torch.zeros_like(parts.means.select(-3, 0))
        for channel in range(self.channels):
            means, log_scales = means_given(parts, channel, images.unsqueeze(-3)), parts.log_scales.select(-4, channel)
            values = most_likely_level(log_weights, means, log_scales)
            images.select(-3, channel).copy_(values)
            log_weights = log_weights + log_level(values.unsqueeze(-3), means, log_scales)
        return images

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One component of each pixel is drawn, then its channels in turn, each rounded before the next one."""
        parts = self.parts(outputs)
        component = chosen(parts.log_weights, uniforms_like(parts.log_weights, generator))
        images = torch.zeros_like(parts.means.select(-3, 0))
        for channel in range(self.channels):
            means = (component * means_given(parts, channel, images.unsqueeze(-3))).sum(dim=-3)
            log_scales = (component * parts.log_scales.select(-4, channel)).sum(dim=-3)
            drawn = logistic(means, log_scales, uniforms_like(means, generator))
            images.select(-3, channel).copy_(to_levels(drawn))
        return images


def uniforms_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers in (0, 1)."""
    drawn = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    return drawn.clamp(min=torch.finfo(like.dtype).tiny)
