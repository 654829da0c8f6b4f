"""Masked autoregressive convolutions over maps, after the masks of van den Oord et al. 2016, "Pixel Recurrent Neural
Networks" (arXiv:1601.06759), for the flows of stage one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masked_dense import hidden_degrees


class MaskedConvolutional(nn.Module):
    """Maps `k b c h w` -> `k b outputs_per_number c h w`: what is put out for a number depends on those before it, in
    the order of rows, columns and, of one place, channels. See `order_of`.

    Every layer reads all channels of the places before, as far as its kernel goes, and of the same place those whose
    degree is not above its own: 1, ..., c of the input's channels and 0, ..., c - 1 of hidden ones; outputs for channel
    i read hidden ones of degrees below i. The first layer adds a linear function of the context, `b context h w`, at
    the same place.
    """

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int],
        outputs_per_number: int,
        kernel: int = 3,
        context: int = 0,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        """hidden: channels of each hidden layer. kernel: odd."""
        super().__init__()
        self.outputs_per_number = outputs_per_number
        self.activation = activation
        positions = torch.arange(1, channels + 1)
        degrees = [positions, *(hidden_degrees(units, 0, channels) for units in hidden)]
        centres = [after[:, None] >= before for before, after in pairwise(degrees)]
        centres.append((positions[:, None] > degrees[-1]).repeat(outputs_per_number, 1))
        self.layers = nn.ModuleList(MaskedConv2d(centre, kernel) for centre in centres)
        self.context = nn.Conv2d(context, centres[0].shape[0], 1, bias=False) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        draws = x.shape[:2]
        x = x.flatten(0, 1)
        for place, layer in enumerate(self.layers):
            x = layer(self.activation(x) if place else x)
            if not place and self.context is not None:
                x = (x.unflatten(0, draws) + self.context(context)).flatten(0, 1)
        return x.unflatten(1, (self.outputs_per_number, -1)).unflatten(0, draws)


class MaskedConv2d(nn.Conv2d):
    """`n i h w` -> `n o h w`, of the places before and, of the same place, where the mask `centre`, `o i`, is true."""

    mask: Tensor

    def __init__(self, centre: Tensor, kernel: int) -> None:
        super().__init__(centre.shape[1], centre.shape[0], kernel, padding=kernel // 2)
        mask = torch.zeros(*centre.shape, kernel * kernel, dtype=torch.bool)
        mask[..., : kernel * kernel // 2] = True
        mask[..., kernel * kernel // 2] = centre
        self.register_buffer("mask", mask.unflatten(-1, (kernel, kernel)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def order_of(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """When each number comes, counted from 0: of vectors (d,) as they stand, of maps (c, h, w) as above."""
    count = torch.Size(shape).numel()
    return torch.arange(count, device=device).view(*shape[1:], shape[0]).movedim(-1, 0)
