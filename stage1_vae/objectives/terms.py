"""The terms that every objective is made of, in nats, of each image and each draw of its latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_vae.posteriors.base import Posterior
from stage1_vae.priors.base import LatentPrior


class Terms(NamedTuple):
    """Of k draws z of the latents of b images. Latents come in groups, one for a model without a hierarchy."""

    latents: tuple[Tensor, ...]  # of each group, k b *shape
    log_likelihood: Tensor  # k b: log p(x|z)
    log_prior: tuple[Tensor, ...]  # of each group, k b n: log p(z) as n terms that add up
    log_posterior: tuple[Tensor, ...]  # of each group, k b n: log q(z|x), likewise
    exact_kl: tuple[Tensor | None, ...]  # of each group: KL(q || p) in closed form, if any; b n, or k b n of each draw
    posteriors: tuple[Posterior, ...] = ()  # of each group: q(z|x), of which the latents are draws unless moved
    priors: tuple[LatentPrior, ...] = ()  # of each group: p(z)
    summed: Tensor | None = None  # k b: log-weights in which a group of few values is summed over; None: there is none

    @property
    def log_weights(self) -> Tensor:
        """k b: log p(x|z) + log p(z) - log q(z|x), of which the ELBO is the mean, and the log of whose exponential's
        mean is the importance-weighted bound. Where a group is summed over, log sum_y p(x|y,z) p(y) p(z) / q(z|x,y),
        whose mean is no less than the ELBO."""
        if self.summed is not None:
            return self.summed
        prior = torch.stack([part.sum(-1) for part in self.log_prior]).sum(0)
        posterior = torch.stack([part.sum(-1) for part in self.log_posterior]).sum(0)
        return self.log_likelihood + prior - posterior

    @property
    def kl(self) -> tuple[Tensor, ...]:
        """Of each group, b n: KL(q(z|x) || p(z)), in closed form where there is one, else estimated from the draws."""
        return tuple(
            sampled_kl(log_prior, log_posterior) if exact is None else exact.mean(0) if exact.ndim > 2 else exact
            for log_prior, log_posterior, exact in zip(self.log_prior, self.log_posterior, self.exact_kl, strict=True)
        )


def sampled_kl(log_prior: Tensor, log_posterior: Tensor) -> Tensor:
    """The mean over draws of log q(z|x) - log p(z): k b n each -> b n. Where they part into unequal numbers of terms,
    n is 1."""
    if log_prior.shape[-1] != log_posterior.shape[-1]:
        log_prior, log_posterior = log_prior.sum(-1, keepdim=True), log_posterior.sum(-1, keepdim=True)
    return (log_posterior - log_prior).mean(dim=0)


def elbo(terms: Terms) -> Tensor:
    """The evidence lower bound of each image, b, in nats: E_q[log p(x|z)] - KL(q(z|x) || p(z)) (Kingma and Welling
    2013, equation 3)."""
    return terms.log_likelihood.mean(dim=0) - total_kl(terms)


def total_kl(terms: Terms) -> Tensor:
    """KL(q(z|x) || p(z)) over all groups, b."""
    return torch.stack([group.sum(-1) for group in terms.kl]).sum(0)
