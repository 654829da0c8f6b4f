"""What a coder asks of a VAE: distributions of whole numbers, the bins of latents and the values of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from common import exact
from common.errors import UserError
from common.exact_distributions import PIECE, SHARE_BITS, logistic, normal, normal_quantiles
from stage1_vae.likelihoods import Bernoulli, BernoulliConfig, Likelihood, LogisticMixture, LogisticMixtureConfig
from stage1_vae.posteriors import DiagonalGaussianConfig

ONE_BITS = 38  # shares of distributions are whole numbers of 2**-38
WEIGHT_BITS = 18  # of components of a mixture: with the 34 of their shares no more than float64 holds
MOST_COMPONENTS = 1024

Shares = Callable[[Tensor], Tensor]
"""Of n distributions over 0, 1, ... k - 1: the share of each below a number from 1 to k - 1 of its own, int64 n ->
int64 n, in units of 2**-38. That of a larger number is never smaller. Below 0 it is 0, and below k 1: nobody asks."""


def posterior_shares(mean: Tensor, scale: Tensor, bits: int) -> Shares:
    """Of 2**bits bins, as likely as each other under N(0, 1), under N(mean, scale**2): float64 n each."""
    edges, _ = normal_quantiles(bits, mean.device)
    inverse = torch.ones_like(scale).div_(scale)

    def shares(bins: Tensor) -> Tensor:
        return in_units(normal((edges[bins] - mean).mul_(inverse)))

    return shares


def latents_of(bins: Tensor, bits: int) -> Tensor:
    """The middle of each of 2**bits bins: int64 -> float64."""
    return normal_quantiles(bits, bins.device)[1][bins]


def bins_of(latents: Tensor, bits: int) -> Tensor:
    """The bin that each number is in: float64 -> int64."""
    edges, _ = normal_quantiles(bits, latents.device)
    return torch.searchsorted(edges, latents.contiguous(), right=True).sub_(1).clamp_(min=0)


def in_units(shares: Tensor) -> Tensor:
    """Of 2**-34, float64, to units of 2**-38, int64."""
    return shares.mul_(2.0 ** (ONE_BITS - SHARE_BITS)).long()


def mean_and_scale(features: Tensor, config: DiagonalGaussianConfig) -> tuple[Tensor, Tensor]:
    """Of a diagonal Gaussian, n d each, as `DiagonalGaussianLayer` has it. Raises UserError for numbers that are not
    finite."""
    mean, raw = features.chunk(2, dim=1)
    scale = exact.exp(raw * 0.5) if config.scale == "exp" else exact.softplus(raw)
    check_finite(features)
    return mean, (scale + config.smallest_scale).clamp_(min=1e-8)


def check_finite(numbers: Tensor) -> None:
    """Raises UserError."""
    if not bool(numbers.isfinite().all()):
        raise UserError("what the model computes is not finite: its weights are damaged; take an earlier checkpoint")


class Pixels(Protocol):
    """The distributions of some pixels of some images, all of a channel in a row, one channel after the other. count:
    of these pixels."""

    count: int

    def shares(self) -> Shares:
        """Of the values of the next channel."""
        ...

    def tell(self, values: Tensor) -> None:
        """What the channel is whose shares were asked for last: int64, as many as there are pixels."""
        ...


class BernoulliPixels:
    """0 for black and 1 for white."""

    bits = 1

    def __init__(self, outputs: Tensor, config: BernoulliConfig, channels: int) -> None:
        """outputs: n H W o, float64."""
        self.count = outputs[..., 0].numel()
        self.channels = iter(rearrange(outputs, "n H W c -> c (n H W)"))

    def shares(self) -> Shares:
        black = in_units(logistic(next(self.channels).neg()))
        return lambda values: black

    def tell(self, values: Tensor) -> None:
        pass  # the other channels do not depend on it


class MixturePixels:
    """0 to 255, as `LogisticMixture` has them. All channels of a pixel are of one component: how likely each is changes
    with every channel that is known."""

    bits = 8

    def __init__(self, outputs: Tensor, config: LogisticMixtureConfig, channels: int) -> None:
        """outputs: n H W o, float64."""
        self.count = outputs[..., 0].numel()
        numbers = rearrange(outputs, "n H W o -> o (n H W)").contiguous()
        logits, rest = numbers.split([config.components, len(numbers) - config.components])
        self.weights = whole_shares(exact.softmax(logits.t()).t())  # m n, whole numbers
        self.parts = rest.view(channels, -1, *logits.shape)  # channel, means and log-scales and coefficients, m n
        self.smallest_log_scale = config.smallest_log_scale
        self.coefficients = exact.tanh(self.parts[:, 2].contiguous()) if channels == 3 else None
        self.known: list[Tensor] = []  # of each channel before, in [-1, 1]

    def shares(self) -> Shares:
        channel = len(self.known)
        self.means, log_scales = self.parts[channel, 0], self.parts[channel, 1]
        if self.coefficients is not None:
            for before, known in enumerate(self.known):
                self.means = self.means + self.coefficients[channel - 1 if before == 0 else 2] * known
        self.inverse_scales = exact.exp(log_scales.clamp(min=self.smallest_log_scale).neg())
        weights, means, inverse_scales = self.weights, self.means, self.inverse_scales
        sums = weights.sum(dim=0)

        def shares(values: Tensor) -> Tensor:
            below = torch.cat(
                [
                    (of_components(some, means[:, here], inverse_scales[:, here]).mul_(weights[:, here])).sum(dim=0)
                    for some, here in pieces(values, len(weights))
                ]
            )
            return in_units(below.div_(sums))

        return shares

    def tell(self, values: Tensor) -> None:
        last = torch.full_like(values, 255)
        below = of_components(values, self.means, self.inverse_scales).mul_(values > 0)
        above = of_components((values + 1).minimum(last), self.means, self.inverse_scales)
        masses = torch.where(values == last, 2.0**SHARE_BITS, above).sub_(below).add_(1).mul_(self.weights)
        self.weights = whole_shares(masses / masses.sum(dim=0))
        self.known.append(values.double() * (1 / 127.5) - 1)


def of_components(values: Tensor, means: Tensor, inverse_scales: Tensor) -> Tensor:
    """How much of each component lies below values, n, from 1 to 255: m n, in units of 2**-34."""
    edges = (values * 2 - 256).double() * (1 / 255)
    return logistic((edges - means).mul_(inverse_scales))


def pieces(values: Tensor, components: int) -> Iterator[tuple[Tensor, slice]]:
    """Of n numbers, as many at a time as are fast, and where they are."""
    count = max(1, PIECE // components) if values.device.type == "cpu" else max(1, len(values))
    for start in range(0, len(values), count):
        here = slice(start, start + count)
        yield values[here], here


def whole_shares(shares: Tensor) -> Tensor:
    """Shares of components, m n, as whole numbers whose sum is at most 2**18: sums of their products with numbers up to
    2**34 are exact."""
    return shares.mul(2.0**WEIGHT_BITS).floor_()


PIXELS: dict[type[Likelihood], Any] = {  # by the class of the likelihood
    Bernoulli: BernoulliPixels,
    LogisticMixture: MixturePixels,
}
