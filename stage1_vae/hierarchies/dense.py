"""Fully connected parts of hierarchies: hidden layers, with or without batch normalisation, and Gaussians."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.hierarchies.base import Normal
from stage1_vae.likelihoods.base import at_least_float
from stage1_vae.networks.batch_norm import BatchNorm
from stage1_vae.networks.dense import ACTIVATIONS, Activation

Variance = Literal["exp", "softplus"]


def hidden_layers(
    inputs: int, units: int, layers: int, activation: Activation, *, batch_norm: bool = False
) -> nn.Sequential:
    """`n inputs` -> `n units`: linear, batch normalisation, activation, `layers` times."""
    parts: list[nn.Module] = []
    for place in range(layers):
        parts.append(nn.Linear(units if place else inputs, units))
        if batch_norm:
            parts.append(BatchNorm(units))
        parts.append(ACTIVATIONS[activation]())
    return nn.Sequential(*parts)


class GaussianLayer(nn.Module):
    """`n inputs` -> a Gaussian of `numbers` independent numbers, whose variance is exp(s) or softplus(s) of what a
    linear layer says."""

    def __init__(self, inputs: int, numbers: int, variance: Variance) -> None:
        super().__init__()
        self.variance = variance
        self.linear = nn.Linear(inputs, 2 * numbers)

    def forward(self, hidden: Tensor) -> Normal:
        mean, raw = at_least_float(self.linear(hidden)).chunk(2, dim=1)
        log_variance = raw if self.variance == "exp" else F.softplus(raw).clamp(min=1e-16).log()
        return Normal(mean, 0.5 * log_variance)


def check_levels(config: Any) -> None:
    """Of a config with `channels`, `latents`, `hidden` and `hidden_layers`. Raises UserError."""
    for name in ("latents", "hidden"):
        numbers = tuple(getattr(config, name))
        object.__setattr__(config, name, numbers)
        if not numbers or any(number < 1 for number in numbers):
            raise UserError(f"model.{name}={numbers}, expected a number of at least 1 for each layer of latents")
    if len(config.latents) != len(config.hidden):
        raise UserError(
            f"model.latents={config.latents} and model.hidden={config.hidden}, expected as many numbers in both: one "
            "of each for every layer of latents, from the image up"
        )
    for name in ("channels", "hidden_layers"):
        if getattr(config, name) < 1:
            raise UserError(f"model.{name}={getattr(config, name)}, expected at least 1")
