"""Masked autoregressive flow of Papamakarios et al. 2017, "Masked Autoregressive Flow for Density Estimation"
(arXiv:1705.07057)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.latents import LatentSpec
from common.distributed import moments_of_all, several_processes, sum_over_processes
from common.errors import check_fields
from common.masked_dense import MaskedDense
from stage2_prior.latents.base import LatentPriorModel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class MaskedAutoregressiveFlowConfig:
    """z becomes N(0, I) in `layers` steps, each of which shifts and scales every number by functions of those before
    it, in one order and then in the other. Its density is exact; drawing takes as many passes as there are numbers."""

    kind: Literal["masked_autoregressive_flow"] = "masked_autoregressive_flow"
    layers: int = 5
    hidden: tuple[int, ...] = (512, 512)  # units of each hidden layer of each step's network
    activation: Literal["relu", "tanh", "elu", "silu"] = "relu"
    batch_norm: bool = False  # after every step: whitens numbers by the batch in training, by averages of it later

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_fields(
            self,
            (
                ("layers", self.layers >= 1, "at least 1"),
                ("hidden", all(units >= 1 for units in self.hidden), "numbers of units of at least 1, or none"),
            ),
        )


class MaskedAutoregressiveFlow(LatentPriorModel):
    kind = "masked_autoregressive_flow"
    config_class = MaskedAutoregressiveFlowConfig
    config: MaskedAutoregressiveFlowConfig

    def __init__(self, config: MaskedAutoregressiveFlowConfig, latent_spec: LatentSpec, *facts: Any) -> None:
        super().__init__(config, latent_spec, *facts)
        size = latent_spec.size
        steps: list[FlowStep] = []
        for _ in range(config.layers):
            steps.append(AutoregressiveStep(size, config))
            if config.batch_norm:
                steps.append(BatchNormStep(size))
        self.steps = nn.ModuleList(steps)

    def to_noise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors b d -> b d, standard normal if they are of this distribution, and the log-determinant of it, b. The
        numbers are taken in the other order after every step."""
        log_determinant = z.new_zeros(len(z))
        for step in self.steps:
            z, more = step(z)
            z, log_determinant = z.flip(1), log_determinant + more
        return z, log_determinant

    def from_noise(self, noise: Tensor) -> Tensor:
        """The inverse of `to_noise`, b d -> b d."""
        for step in reversed(self.steps):
            assert isinstance(step, FlowStep)
            noise = step.inverse(noise.flip(1))
        return noise

    def log_density_of_standard(self, z: Tensor) -> Tensor:
        noise, log_determinant = self.to_noise(z)
        return (-0.5 * noise.square() - 0.5 * math.log(2 * math.pi)).sum(1) + log_determinant

    @torch.no_grad()
    def sample_standard(self, count: int, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(count, self.latent_spec.size, device=self.shift.device, generator=generator)
        return self.from_noise(noise)

    def update(self) -> None:
        for step in self.steps:
            if isinstance(step, BatchNormStep):
                step.update()

    def forget(self) -> None:
        for step in self.steps:
            if isinstance(step, BatchNormStep):
                step.noted = []


class FlowStep(nn.Module):
    """Vectors b d -> b d, and the log-determinant of it, b."""

    def inverse(self, noise: Tensor) -> Tensor:
        raise NotImplementedError


class AutoregressiveStep(FlowStep):
    """u_i = (z_i - shift_i) exp(-log_scale_i), both functions of z_1 ... z_(i-1)."""

    def __init__(self, size: int, config: MaskedAutoregressiveFlowConfig) -> None:
        super().__init__()
        self.network = MaskedDense(size, config.hidden, 2, activation=ACTIVATIONS[config.activation])
        last = self.network.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # the identity at first
        nn.init.zeros_(last.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.network(z).float().unbind(-2)
        return (z - shift) * (-log_scale).exp(), -log_scale.sum(1)

    def inverse(self, noise: Tensor) -> Tensor:
        z = torch.zeros_like(noise)
        for i in range(noise.shape[1]):
            shift, log_scale = self.network(z).float().unbind(-2)
            z[:, i] = noise[:, i] * log_scale[:, i].exp() + shift[:, i]
        return z


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, d each, of b d of all processes."""
    if not several_processes():
        return z.mean(0), z.var(0)
    mean, variance, count = moments_of_all(z)
    return mean[0], variance[0] * (count / (count - 1))


class BatchNormStep(FlowStep):
    """Numbers less their mean, over their deviation, of the micro-batch on all processes in training and of an average
    of those before else, times a learned factor plus a learned shift."""

    running_mean: Tensor
    running_variance: Tensor
    momentum = 0.1
    epsilon = 1e-5

    def __init__(self, size: int) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(size))
        self.shift = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_variance", torch.ones(size))
        self.noted: list[Tensor] = []  # mean and variance, 2 d, of each micro-batch of a step

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self.running_mean, self.running_variance
        if self.training and (len(z) > 1 or several_processes()):
            mean, variance = moments(z)
            self.noted.append(torch.stack([mean, variance]).detach())
        log_scales = self.log_factor - 0.5 * (variance + self.epsilon).log()
        return (z - mean) * log_scales.exp() + self.shift, log_scales.sum().expand(len(z))

    def inverse(self, noise: Tensor) -> Tensor:
        scales = (self.running_variance + self.epsilon).sqrt() * (-self.log_factor).exp()
        return (noise - self.shift) * scales + self.running_mean

    def update(self) -> None:
        """Moves the averages by what the micro-batches of this step showed, on all processes."""
        if not self.noted:
            return
        total = torch.stack(self.noted).sum(0)
        count = sum_over_processes(torch.tensor(float(len(self.noted)), device=total.device))
        mean, variance = sum_over_processes(total) / count
        self.running_mean.lerp_(mean, self.momentum)
        self.running_variance.lerp_(variance, self.momentum)
        self.noted = []
