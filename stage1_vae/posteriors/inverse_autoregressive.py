"""Inverse autoregressive flow of Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow"
(arXiv:1606.04934)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from common.errors import check_fields
from common.masked_dense import MaskedDense
from stage1_vae.posteriors.base import Draws, LatentShape, Posterior, PosteriorLayer, without_autocast
from stage1_vae.posteriors.diagonal import DiagonalGaussian, ScaleFunction, check_smallest_scale, log_scales
from stage1_vae.posteriors.masked_convolution import MaskedConvolutional, order_of

Activation = Literal["relu", "tanh", "elu", "silu", "softplus"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "silu": F.silu,
    "softplus": F.softplus,
}

# m and s for all latents `k b *shape`, as `k b 2 *shape`, of those that come before each, and of the context
AutoregressiveNetwork = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class InverseAutoregressiveConfig:
    """Draws of a diagonal Gaussian pass through `steps` steps z <- gate z + (1 - gate) m, gate = sigmoid(s), where m
    and s of each number are functions of those before it and of a context that the encoder gives. Every step's order is
    the reverse of the last one's. Drawing takes all numbers at once, the density of given latents one after the other.

    The functions are masked networks: dense for latents (d,), and convolutional for maps (c, h, w), whose numbers come
    in the order of rows, columns and, of one place, channels.
    """

    kind: Literal["inverse_autoregressive"] = "inverse_autoregressive"
    steps: int = 2
    hidden: tuple[int, ...] = (320,)  # units, or channels, of each hidden layer of a step's network
    activation: Activation = "elu"
    context: int = 64  # numbers of the context, of maps at each place; 0 for none
    kernel: int = 3  # of the convolutions over maps
    gate_bias: float = 2.0  # s before training: gates near 1 leave the Gaussian as it is
    scale: ScaleFunction = "exp"  # of the Gaussian, as in `diagonal`
    smallest_scale: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_smallest_scale(self.smallest_scale)
        rules = (
            ("steps", self.steps >= 1, "at least 1"),
            ("hidden", all(units >= 1 for units in self.hidden), "numbers of units of at least 1, or none"),
            ("context", self.context >= 0, "0 or more"),
            ("kernel", self.kernel >= 1 and self.kernel % 2 == 1, "an odd number, such as 3"),
        )
        check_fields(self, rules)


class InverseAutoregressive(Posterior):
    """base: the Gaussian before the first step. networks: of each step. context: `b features`, or `b features h w`.

    A density has a term for each number: the Gaussian's, less the log of the number's gate in each step.
    """

    def __init__(
        self, base: DiagonalGaussian, networks: Sequence[AutoregressiveNetwork], context: Tensor | None
    ) -> None:
        self.base, self.networks, self.context = base, networks, context

    @property
    def mean(self) -> Tensor:
        """What the flow makes of the Gaussian's mean: its own has no closed form."""
        return self.flow(self.base.mean[None])[0][0]

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.base.noise(count, generator)

    def draw(self, noise: Tensor) -> Draws:
        start, log_density = self.base.draw(noise)
        latents, log_gates = self.flow(start)
        return Draws(latents, log_density - log_gates.flatten(2))

    def log_density(self, latents: Tensor) -> Tensor:
        """Undoes the steps, in as many passes of each as an image has numbers."""
        start, log_gates = self.inverse(latents)
        return self.base.log_density(start) - log_gates.flatten(2)

    def flow(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of the Gaussian, k b *shape -> latents, and the log of each number's gates."""
        total = torch.zeros_like(z)
        with without_autocast(z):
            for place, network in enumerate(self.networks):
                turned = reverse(z) if place % 2 else z
                moved, log_gate = gated(turned, *network(turned, self.context).unbind(2))
                z, total = (reverse(moved), total + reverse(log_gate)) if place % 2 else (moved, total + log_gate)
        return z, total

    def inverse(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents -> what `flow` made them of, and the log of each number's gates."""
        total = torch.zeros_like(latents)
        z = latents
        with without_autocast(z):
            for place, network in reversed(list(enumerate(self.networks))):
                started, log_gate = undo(reverse(z) if place % 2 else z, network, self.context)
                z, log_gate = (reverse(started), reverse(log_gate)) if place % 2 else (started, log_gate)
                total = total + log_gate
        return z, total

    def without_gradient(self) -> Self:
        return type(self)(
            self.base.without_gradient(),
            [fixed(network) for network in self.networks],
            None if self.context is None else self.context.detach(),
        )


def gated(z: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """One step, and the logs of its gates: their sum is the log-determinant (equations 13 and 14 of the paper)."""
    return s.sigmoid() * z + (-s).sigmoid() * m, F.logsigmoid(s)


def undo(moved: Tensor, network: AutoregressiveNetwork, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `gated` moved, and the logs of its gates, number by number: m and s of each are known once those before it
    are. Numbers that are not known yet stand as 0, which no mask lets through."""
    order = order_of(tuple(moved.shape[2:]), moved.device)
    z, log_gate = torch.zeros_like(moved), torch.zeros_like(moved)
    for number in range(order.numel()):
        m, s = network(z, context).unbind(2)
        now = order == number
        z = torch.where(now, (moved - (-s).sigmoid() * m) / s.sigmoid(), z)
        log_gate = torch.where(now, F.logsigmoid(s), log_gate)
    return z, log_gate


def reverse(z: Tensor) -> Tensor:
    """`k b *shape` in the reverse order."""
    return z.flip(tuple(range(2, z.ndim)))


def fixed(network: AutoregressiveNetwork) -> AutoregressiveNetwork:
    """The same function, whose parameters have no gradient."""
    if not isinstance(network, nn.Module):
        return network
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return lambda z, context: functional_call(network, parameters, (z, context))


class InverseAutoregressiveLayer(PosteriorLayer):
    """Features: means and scales of the Gaussian, and the context."""

    config: InverseAutoregressiveConfig

    def __init__(self, config: InverseAutoregressiveConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.features = 2 * shape[0] + config.context
        self.networks = nn.ModuleList(self.step_network() for _ in range(config.steps))

    def step_network(self) -> nn.Module:
        config, numbers = self.config, self.shape[0]
        activation = ACTIVATIONS[config.activation]
        network: MaskedDense | MaskedConvolutional
        if len(self.shape) == 1:
            network = MaskedDense(numbers, config.hidden, 2, config.context, activation)
        else:
            network = MaskedConvolutional(numbers, config.hidden, 2, config.kernel, config.context, activation)
        last: Any = network.layers[-1]
        nn.init.constant_(last.bias[numbers:], config.gate_bias)  # the second half are s
        return network

    def forward(self, features: Tensor) -> InverseAutoregressive:
        numbers = self.shape[0]
        mean, raw, context = features.float().split([numbers, numbers, self.config.context], dim=1)
        base = DiagonalGaussian(mean, log_scales(raw, self.config.scale, self.config.smallest_scale))
        return InverseAutoregressive(base, list(self.networks), context if self.config.context else None)
