"""Autoregressive Gaussian prior of Razavi et al. 2019, "Preventing Posterior Collapse with delta-VAEs"
(arXiv:1901.03416): no posterior whose numbers are independent can match it, so none has less than a certain rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.errors import check_fields
from stage1_vae.posteriors.base import LatentShape, Posterior, flat_terms
from stage1_vae.posteriors.diagonal import DiagonalGaussian
from stage1_vae.priors.base import LatentPrior


@dataclass(frozen=True, kw_only=True)
class AutoregressiveGaussianConfig:
    """z_1 ~ N(0, 1) and z_t ~ N(alpha z_(t-1), 1 - alpha^2), so that each number alone is standard normal."""

    kind: Literal["autoregressive_gaussian"] = "autoregressive_gaussian"
    correlation: float = 0.9  # alpha, of neighbours: 0 is the standard normal prior

    def __post_init__(self) -> None:
        check_fields(self, (("correlation", 0 <= self.correlation < 1, "at least 0 and below 1"),))


class AutoregressiveGaussian(LatentPrior):
    """Latents (d,) are one sequence of d steps; a map (c, h, w) is c independent sequences of h w steps, row by row."""

    config: AutoregressiveGaussianConfig
    place: Tensor

    def __init__(self, config: AutoregressiveGaussianConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.sequences = 1 if len(shape) == 1 else shape[0]
        self.steps = math.prod(shape) // self.sequences
        self.register_buffer("place", torch.empty(0), persistent=False)  # tells the device

    @property
    def committed_rate(self) -> float:
        """The least KL(q || p) in nats of any q whose numbers are independent, as `smallest_rate` has it."""
        return self.sequences * smallest_rate(self.config.correlation, self.steps)

    def log_density(self, latents: Tensor) -> Tensor:
        z = self.as_sequences(latents)  # k b c n
        before = torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], dim=-1)
        variance = self.variances(z)
        errors = z - self.config.correlation * before
        return (-0.5 * (errors.square() / variance + variance.log() + math.log(2 * math.pi))).flatten(2)

    def kl(self, posterior: Posterior) -> Tensor | None:
        """In closed form for a diagonal Gaussian: the term of z_t is the mean, over z_(t-1) of the posterior, of
        KL(q(z_t|x) || p(z_t|z_(t-1)))."""
        if not isinstance(posterior, DiagonalGaussian):
            return None
        alpha = self.config.correlation
        mean, log_scale = self.as_sequences(posterior.mean), self.as_sequences(posterior.log_scale)  # b c n
        own = (2 * log_scale).exp()
        before = torch.cat([torch.zeros_like(mean[..., :1]), mean[..., :-1]], dim=-1)
        before_own = torch.cat([torch.zeros_like(own[..., :1]), own[..., :-1]], dim=-1)
        variance = self.variances(mean)
        squares = (mean - alpha * before).square() + own + alpha**2 * before_own
        return flat_terms(0.5 * (squares / variance + variance.log() - 1) - log_scale, 1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(count, self.sequences, self.steps, device=self.place.device, generator=generator)
        noise *= self.variances(noise).sqrt()
        z = [noise[..., 0]]
        for step in range(1, self.steps):
            z.append(self.config.correlation * z[-1] + noise[..., step])
        return torch.stack(z, dim=-1).reshape(count, *self.shape)

    def as_sequences(self, latents: Tensor) -> Tensor:
        """`... *shape` -> `... c n`."""
        return latents.reshape(*latents.shape[: latents.ndim - len(self.shape)], self.sequences, self.steps)

    def variances(self, like: Tensor) -> Tensor:
        """n: of each step given the one before it."""
        variances = like.new_full((self.steps,), 1 - self.config.correlation**2)
        variances[0] = 1
        return variances


def smallest_rate(correlation: float, steps: int) -> float:
    """The least KL in nats between N(mean, diag(scale^2)) over a sequence of `steps` numbers and the prior, whose
    precision matrix is tridiagonal: at mean 0, and scale^2 one over its diagonal (section 2.2 of the paper)."""
    if steps == 1:
        return 0.0
    return 0.5 * ((steps - 2) * math.log1p(correlation**2) - math.log1p(-(correlation**2)))
