"""Expectation maximisation of Gaussian mixtures (Dempster, Laird and Rubin 1977), in float64, chunk by chunk."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Covariance = Literal["diagonal", "full"]
CHUNK = 8192  # vectors at a time


class Mixture(NamedTuple):
    """Of K Gaussians over vectors of d numbers."""

    log_weights: Tensor  # K
    means: Tensor  # K d
    factors: Tensor  # K d d, lower triangles L of covariances L L^T; of diagonal ones K d, their standard deviations

    def log_densities(self, z: Tensor) -> Tensor:
        """The log of each component's density times its weight: n d -> n K."""
        centred = z - self.means[:, None]  # K n d
        if self.factors.ndim == 2:
            noise = centred / self.factors[:, None]
            log_scales = self.factors.log().sum(1)
        else:
            noise = torch.linalg.solve_triangular(self.factors, centred.mT, upper=False).mT
            log_scales = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi)
        return (-0.5 * noise.square().sum(2)).T + (self.log_weights - log_scales - constant)


def fit_mixture(
    z: Tensor,
    components: int,
    covariance: Covariance,
    iterations: int,
    smallest_scale: float,
    kmeans_iterations: int = 0,
) -> tuple[Mixture, list[float]]:
    """A mixture of vectors n d, and the mean log-likelihood in nats before each iteration and after the last.

    It starts from `components` vectors that lie apart (k-means++, Arthur and Vassilvitskii 2007), drawn by the global
    generator, or from the means that k-means makes of them, with the covariance of all vectors around these. To each
    variance smallest_scale^2 is added, so that none vanishes.
    """
    z = z.double()
    means = vectors_apart(z, components)
    around = z - z.mean(0)
    for _ in range(kmeans_iterations):
        nearest = torch.cat([torch.cdist(part, means).argmin(1) for part in z.split(CHUNK)])
        counts = nearest.bincount(minlength=components).unsqueeze(1)
        sums = torch.zeros_like(means).index_add_(0, nearest, z)
        around = z - means[nearest]
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    everything = (around.T @ around / len(z)).repeat(components, 1, 1)
    mixture = Mixture(
        torch.full((components,), -math.log(components), dtype=torch.float64, device=z.device),
        means,
        triangles_of(everything, smallest_scale)
        if covariance == "full"
        else scales_of(everything.diagonal(dim1=1, dim2=2), smallest_scale),
    )
    history = []
    for _ in range(iterations):
        mixture, likelihood = improved(mixture, z, smallest_scale)
        history.append(likelihood)
    final = torch.cat([mixture.log_densities(part).logsumexp(1) for part in z.split(CHUNK)])
    return mixture, [*history, float(final.mean())]


def improved(mixture: Mixture, z: Tensor, smallest_scale: float) -> tuple[Mixture, float]:
    """One iteration: the next mixture, and the mean log-likelihood of this one. A component that next to nothing
    belongs to stays as it is."""
    counts = torch.zeros_like(mixture.log_weights)
    sums = torch.zeros_like(mixture.means)
    squares = torch.zeros(mixture.factors.shape, dtype=z.dtype, device=z.device)
    likelihood = 0.0
    for part in z.split(CHUNK):
        log_densities = mixture.log_densities(part)
        total = log_densities.logsumexp(1, keepdim=True)
        shares = (log_densities - total).exp()  # n K: how much of a vector belongs to a component
        likelihood += float(total.sum())
        counts += shares.sum(0)
        sums += shares.T @ part
        if squares.ndim == 2:
            squares += shares.T @ part.square()
        else:
            squares += torch.einsum("nk,ni,nj->kij", shares, part, part)
    alive = counts > 1e-3
    held = counts.clamp(min=1e-3)
    means = torch.where(alive[:, None], sums / held[:, None], mixture.means)
    if squares.ndim == 2:
        scales = scales_of(squares / held[:, None] - means.square(), smallest_scale)
        factors = torch.where(alive[:, None], scales, mixture.factors)
    else:
        covariances = squares / held[:, None, None] - means[:, :, None] * means[:, None]
        identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        triangles = triangles_of(torch.where(alive[:, None, None], covariances, identity), smallest_scale)
        factors = torch.where(alive[:, None, None], triangles, mixture.factors)
    weights = held / held.sum()
    return Mixture(weights.log(), means, factors), likelihood / len(z)


def scales_of(variances: Tensor, smallest_scale: float) -> Tensor:
    """K d: standard deviations."""
    return (variances.clamp(min=0) + smallest_scale**2).sqrt()


def triangles_of(covariances: Tensor, smallest_scale: float) -> Tensor:
    """K d d: lower triangles L of covariances L L^T."""
    identity = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    return torch.linalg.cholesky(covariances + smallest_scale**2 * identity)


def vectors_apart(z: Tensor, count: int) -> Tensor:
    """`count` of the vectors n d, each drawn by the square of its distance to those before it."""
    chosen = [int(torch.randint(len(z), ()))]
    distances = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
    for _ in range(count - 1):
        distances = torch.minimum(distances, (z - z[chosen[-1]]).square().sum(1))
        edges = distances.cumsum(0)
        drawn = torch.rand((), dtype=torch.float64).to(z.device) * edges[-1]
        chosen.append(min(int(torch.searchsorted(edges, drawn)), len(z) - 1))
    return z[chosen]
