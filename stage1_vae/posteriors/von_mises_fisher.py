"""Von Mises-Fisher posterior on the unit sphere: of the hyperspherical VAE of Davidson et al. 2018 (arXiv:1804.00891),
with the fixed concentration of Xu and Durrett 2018 (arXiv:1808.10805)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, check_fields
from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer, vector_length
from stage1_vae.posteriors.bessel import log_bessel_and_ratio


@dataclass(frozen=True, kw_only=True)
class VonMisesFisherConfig:
    """q(z|x) = C exp(concentration mean^T z) over unit vectors z, whose mean direction the encoder says. Its KL
    divergence to the prior `uniform_sphere` is the same for every image, so that it cannot collapse."""

    kind: Literal["von_mises_fisher"] = "von_mises_fisher"
    concentration: float = 80.0  # kappa: 0 is the uniform distribution

    def __post_init__(self) -> None:
        check_fields(self, (("concentration", 0 <= self.concentration < math.inf, "0 or more"),))


class VonMisesFisher(Posterior):
    """mean: b d, unit vectors, the mean directions. Densities are over the sphere's area, and of one term."""

    def __init__(self, mean: Tensor, concentration: float) -> None:
        self._mean, self.concentration = mean, concentration
        self.log_peak, self.kl = constants(mean.shape[-1], concentration)

    @property
    def mean(self) -> Tensor:
        """The mean direction: a latent, which the mean itself, nearer to the centre, is not."""
        return self._mean

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws for the mean direction (1, 0, ..., 0)."""
        images, dimension = self._mean.shape
        concentration = torch.full((count, images), self.concentration, device=self._mean.device, dtype=torch.float64)
        return draw_noise(dimension, concentration, generator).float()

    def draw(self, noise: Tensor) -> Draws:
        """Reflects the noise so that (1, 0, ..., 0) becomes the mean direction: at the bisector of that and the mean
        direction, or of its opposite and the mean direction, whichever is farther from nothing."""
        first = F.one_hot(torch.zeros((), dtype=torch.long, device=noise.device), noise.shape[-1]).to(noise)
        sign = torch.where(self._mean[:, :1] < 0, -1.0, 1.0)
        latents = -sign * reflect(noise, first + sign * self._mean)
        return Draws(latents, self.density_at((noise - first).square().sum(-1, keepdim=True)))

    def log_density(self, latents: Tensor) -> Tensor:
        """Of unit vectors."""
        return self.density_at((latents - self._mean).square().sum(-1, keepdim=True))

    def density_at(self, squared_distance: Tensor) -> Tensor:
        """By the squared distance from the mean direction: 2 - 2 mean^T z, without its cancellation."""
        return self.log_peak - 0.5 * self.concentration * squared_distance

    def kl_to_uniform_sphere(self) -> Tensor:
        return self._mean.new_full((len(self._mean), 1), self.kl)

    def without_gradient(self) -> Self:
        return type(self)(self._mean.detach(), self.concentration)


class VonMisesFisherLayer(PosteriorLayer):
    """Features: a vector in the mean direction. One of no length at all has the direction (1, 0, ..., 0)."""

    config: VonMisesFisherConfig

    def __init__(self, config: VonMisesFisherConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.features = vector_length(config.kind, shape)
        if self.features < 2:
            raise UserError(
                "posterior.kind=von_mises_fisher for one latent, expected at least 2: there are but two points"
            )

    def forward(self, features: Tensor) -> VonMisesFisher:
        vectors = features.float()
        first = F.one_hot(torch.zeros((), dtype=torch.long, device=vectors.device), self.features).to(vectors)
        vectors = torch.where(vectors.norm(dim=-1, keepdim=True) > 1e-12, vectors, first)
        return VonMisesFisher(F.normalize(vectors, dim=-1), self.config.concentration)


def log_peak(dimension: int, concentration: Tensor) -> Tensor:
    """log q at the mean direction, in nats and float64, of any concentrations."""
    return -dimension / 2 * math.log(2 * math.pi) - log_bessel_and_ratio(dimension / 2 - 1, concentration)[0]


def log_normaliser(dimension: int, concentration: Tensor) -> Tensor:
    """log C, of log q(z) = log C + concentration mean^T z, in float64."""
    return log_peak(dimension, concentration) - concentration.double()


def mean_length(dimension: int, concentration: Tensor) -> Tensor:
    """E[mean^T z] = I_(d/2) / I_(d/2-1), in float64."""
    return concentration.double() * log_bessel_and_ratio(dimension / 2 - 1, concentration)[1]


def kl_to_uniform(dimension: int, concentration: Tensor) -> Tensor:
    """KL(q || uniform) in nats and float64 (Davidson et al., equation 4), with its derivative in the concentration."""
    short = 1 - mean_length(dimension, concentration)
    return log_peak(dimension, concentration) - concentration.double() * short + log_area(dimension)


def log_area(dimension: int) -> float:
    """Of the unit sphere of vectors of this many numbers."""
    return math.log(2) + dimension / 2 * math.log(math.pi) - math.lgamma(dimension / 2)


@cache
def constants(dimension: int, concentration: float) -> tuple[float, float]:
    """log q at the mean direction, and KL(q || uniform)."""
    kappa = torch.tensor(concentration, dtype=torch.float64, device="cpu")
    return float(log_peak(dimension, kappa)), float(kl_to_uniform(dimension, kappa))


def draw_noise(dimension: int, concentration: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws for the mean direction (1, 0, ..., 0), one for each concentration: `...` -> `... dimension`, in float64. By
    the rejection of Ulrich 1984 and Wood 1994, "Simulation of the von Mises Fisher distribution"."""
    kappa = concentration.double().flatten()
    envelopes = envelope(dimension, kappa)
    shares = torch.zeros_like(kappa)
    pending = torch.arange(len(kappa), device=kappa.device)
    while len(pending):
        normal = torch.randn(len(pending), dimension, device=kappa.device, dtype=kappa.dtype, generator=generator)
        proposed = (1 + normal[:, 0] / normal.norm(dim=-1)) / 2  # of Beta((d - 1) / 2, (d - 1) / 2)
        uniform = torch.rand(len(pending), device=kappa.device, dtype=kappa.dtype, generator=generator)
        accepted = log_acceptance(dimension, kappa[pending], envelopes[pending], proposed) >= uniform.log()
        shares[pending[accepted]] = proposed[accepted]
        pending = pending[~accepted]
    tangent = torch.randn(len(kappa), dimension - 1, device=kappa.device, dtype=kappa.dtype, generator=generator)
    return unit_vectors(shares[:, None], envelopes[:, None], tangent).unflatten(0, concentration.shape)


def envelope(dimension: int, concentration: Tensor) -> Tensor:
    """Wood's b, by which proposals are as near the mean direction as draws: so written that it does not cancel where
    the concentration is large, and it becomes (d - 1) / (4 concentration)."""
    freedom = dimension - 1
    return freedom / (2 * concentration + (4 * concentration.square() + freedom**2).sqrt())


def log_acceptance(dimension: int, concentration: Tensor, envelope: Tensor, share: Tensor) -> Tensor:
    """The log of the probability with which Wood's algorithm keeps a proposal made of `share`, a Beta variate."""
    below = 1 - (1 - envelope) * share
    ahead = (
        2 * envelope * (1 / (1 + envelope) - share / below)
    )  # the proposal's cosine less the one that is kept surely
    return concentration * ahead + (dimension - 1) * ((1 + envelope) / (2 * below)).log()


def unit_vectors(share: Tensor, envelope: Tensor, tangent: Tensor) -> Tensor:
    """Unit vectors `... d` of a proposal's share, `... 1`, and any vectors across the mean direction, `... d-1`."""
    below = 1 - (1 - envelope) * share
    cosine = (1 - (1 + envelope) * share) / below
    sine = 2 * (envelope * share * (1 - share)).sqrt() / below
    return torch.cat([cosine, sine * F.normalize(tangent, dim=-1)], dim=-1)


def reflect(vectors: Tensor, normal: Tensor) -> Tensor:
    """At the plane through 0 that this vector of any length is normal to (Householder)."""
    return vectors - 2 * normal * ((normal * vectors).sum(-1, keepdim=True) / normal.square().sum(-1, keepdim=True))
