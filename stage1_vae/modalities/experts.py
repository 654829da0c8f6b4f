"""Posteriors of several modalities as one: each is an expert, q(z|x_m), a Gaussian or a Laplace distribution of
independent numbers.

    product   q(z|x_1 ... x_M) = p(z) prod_m q(z|x_m), normalised: of Gaussians again a Gaussian, whose precision is the
              sum of theirs, that of the prior N(0, I) included. What is missing is left out. MVAE (Wu and Goodman 2018,
              arXiv:1802.05335)
    mixture   q(z|x_1 ... x_M) = 1/M sum_m q(z|x_m). MMVAE (Shi et al. 2019, arXiv:1911.03393)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_vae.hierarchies.base import Normal

LOG_TWO = math.log(2)


class Laplace(NamedTuple):
    """A Laplace distribution of independent numbers: location and log of the scale, n *shape each."""

    mean: Tensor
    log_scale: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """noise: uniform in (-1, 1)."""
        return self.mean - self.log_scale.exp() * noise.sign() * torch.log1p(-noise.abs())

    def log_density(self, latents: Tensor) -> Tensor:
        """n *shape -> n d, of each number, in nats."""
        return (-(latents - self.mean).abs() * (-self.log_scale).exp() - LOG_TWO - self.log_scale).flatten(1)


Expert = Normal | Laplace


def product_of_experts(means: Tensor, log_variances: Tensor, *, prior: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the normalised product of Gaussians, M ... -> ... each. An infinite log-variance is an
    expert that is not there. prior: whether N(0, I) is one of the factors; without it there must be another."""
    log_precisions = -log_variances  # M ...
    if prior:
        zeros = torch.zeros_like(means[:1])
        means, log_precisions = torch.cat([zeros, means]), torch.cat([zeros, log_precisions])
    log_variance = -log_precisions.logsumexp(dim=0)
    shares = (log_precisions + log_variance).exp()
    return (shares * means).sum(dim=0), log_variance


def joint_normal(experts: Sequence[Normal], present: Sequence[Tensor]) -> Normal:
    """The product of the experts of each image, and N(0, I). present: of each expert, b: whether its modality is
    there."""
    means = torch.stack([expert.mean for expert in experts])
    log_variances = torch.stack([2 * expert.log_scale for expert in experts])
    missing = ~torch.stack(list(present))[..., None]
    mean, log_variance = product_of_experts(means, log_variances.masked_fill(missing, math.inf))
    return Normal(mean, 0.5 * log_variance)


def log_mixture(experts: Sequence[Expert], present: Sequence[Tensor], latents: Tensor) -> Tensor:
    """log (1/M sum_m q(z|x_m)) of the M experts whose modalities are there, of draws for each image: k b d -> k b."""
    found = []
    for expert, there in zip(experts, present, strict=True):
        density = torch.stack([expert.log_density(draw).sum(-1) for draw in latents])
        found.append(density.masked_fill(~there, -math.inf))
    return torch.stack(found).logsumexp(dim=0) - torch.stack(list(present)).sum(dim=0).log()
