"""The second VAE of Dai and Wipf 2019, "Diagnosing and Enhancing VAE Models" (arXiv:1903.05789): a VAE over the latents
of the first, whose own latents can match N(0, I) where those of the first lie near a manifold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.latents import LatentSpec
from common.draws import normal_like
from common.errors import check_fields
from stage2_prior.latents.base import LatentPriorModel

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class SecondVAEConfig:
    """p(u) = N(0, I) and p(z|u) = N(mean(u), scale^2 I), of networks of fully connected layers."""

    kind: Literal["second_vae"] = "second_vae"
    latents: int | None = None  # numbers of u; left out: as many as z has
    hidden: tuple[int, ...] = (1024, 1024, 1024)  # units of each hidden layer, of both networks
    activation: Literal["relu", "tanh", "elu", "silu"] = "relu"
    draws: int = 64  # of u, for each log-density: more of them come nearer to it from below

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_fields(
            self,
            (
                ("latents", self.latents is None or self.latents >= 1, "at least 1, or none"),
                ("hidden", all(units >= 1 for units in self.hidden), "numbers of units of at least 1, or none"),
                ("draws", self.draws >= 1, "at least 1"),
            ),
        )


class SecondVAE(LatentPriorModel):
    """`log_density` is the importance-weighted bound of Burda et al. 2015 (arXiv:1509.00519), by noise that is the same
    at every call; training minimises the negative ELBO."""

    kind = "second_vae"
    config_class = SecondVAEConfig
    config: SecondVAEConfig
    exact = False

    def __init__(self, config: SecondVAEConfig, latent_spec: LatentSpec, *facts: Any) -> None:
        super().__init__(config, latent_spec, *facts)
        size = latent_spec.size
        self.width = config.latents or size
        self.encoder = Dense([size, *config.hidden, 2 * self.width], config.activation)
        self.decoder = Dense([self.width, *config.hidden, size], config.activation)
        self.log_scale = nn.Parameter(torch.zeros(()))  # of p(z|u)

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of q(u|z): b d -> b w each."""
        mean, log_variance = self.encoder(z).float().chunk(2, dim=-1)
        return mean, 0.5 * log_variance

    def log_likelihood(self, u: Tensor, z: Tensor) -> Tensor:
        """log p(z|u): `... w`, `... d` -> `...`."""
        noise = (z - self.decoder(u).float()) * (-self.log_scale).exp()
        return (-0.5 * noise.square() - HALF_LOG_TWO_PI - self.log_scale).sum(-1)

    def loss_of_standard(self, z: Tensor) -> Tensor:
        mean, log_scale = self.posterior(z)
        u = mean + log_scale.exp() * normal_like(mean)
        kl = (0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale).sum(-1)
        return kl - self.log_likelihood(u, z)

    def log_density_of_standard(self, z: Tensor) -> Tensor:
        mean, log_scale = self.posterior(z)
        generator = torch.Generator(z.device).manual_seed(0)
        noise = torch.randn(self.config.draws, 1, self.width, device=z.device, generator=generator)
        u = mean + log_scale.exp() * noise  # k b w
        log_prior = (-0.5 * u.square() - HALF_LOG_TWO_PI).sum(-1)
        log_posterior = (-0.5 * noise.square() - HALF_LOG_TWO_PI - log_scale).sum(-1)
        log_weights = self.log_likelihood(u, z) + log_prior - log_posterior
        return log_weights.logsumexp(0) - math.log(self.config.draws)

    @torch.no_grad()
    def sample_standard(self, count: int, generator: torch.Generator | None) -> Tensor:
        device = self.shift.device
        mean = self.decoder(torch.randn(count, self.width, device=device, generator=generator)).float()
        return mean + self.log_scale.exp() * torch.randn(mean.shape, device=device, generator=generator)


class Dense(nn.Module):
    """`... sizes[0]` -> `... sizes[-1]`."""

    def __init__(self, sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(self.activation(x) if place else x)
        return x
