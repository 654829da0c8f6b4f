"""Masked autoregressive dense network of Germain et al. 2015, "MADE: Masked Autoencoder for Distribution Estimation"
(arXiv:1502.03509), for the flows of both stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedDense(nn.Module):
    """Numbers `... inputs` -> `... outputs_per_input inputs`: what is put out for a number depends on those before it.

    Degrees say what a unit may read: input i has the degree i, counted from 1, a hidden unit of degree g reads units of
    degrees up to g, and outputs for input i read hidden units of degrees below i. Hidden degrees are those of
    `hidden_degrees`, from 1 on without a context. With one they begin at 0: units of degree 0 read the context alone,
    and through them it reaches the outputs for the first input too.

    The first layer adds a linear function of the context, `... context`, whose leading axes broadcast with those of the
    numbers: of b images, it is computed once for any number of draws.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs_per_input: int,
        context: int = 0,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        """hidden: units of each hidden layer; none: linear. context: how many numbers it has, 0 for none."""
        super().__init__()
        self.outputs_per_input = outputs_per_input
        self.activation = activation
        lowest = 0 if context else 1
        positions = torch.arange(1, inputs + 1)
        degrees = [positions, *(hidden_degrees(units, lowest, inputs) for units in hidden)]
        masks = [after[:, None] >= before for before, after in pairwise(degrees)]
        masks.append((positions[:, None] > degrees[-1]).repeat(outputs_per_input, 1))
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks)
        self.context = nn.Linear(context, masks[0].shape[0], bias=False) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(self.activation(x) if place else x)
            if not place and self.context is not None:
                x = x + self.context(context)
        return x.unflatten(-1, (self.outputs_per_input, -1))


class MaskedLinear(nn.Linear):
    """`... i` -> `... o` without the weights where the mask, `o i`, is false."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def hidden_degrees(units: int, lowest: int, inputs: int) -> Tensor:
    """Degrees from `lowest` to inputs - 1, the highest that an output reads: taken in turn, or, by fewer units than
    degrees, spread evenly over all of them."""
    count = max(inputs - lowest, 1)  # of one input without a context nothing can be read: its outputs are constants
    if units >= count:
        return lowest + torch.arange(units) % count
    return lowest + (torch.arange(units) * (count - 1)).div(max(units - 1, 1), rounding_mode="floor")
