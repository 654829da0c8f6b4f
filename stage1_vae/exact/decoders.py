"""Decoders in exact arithmetic: they walk the grids of an image's pixels, whose numbers somebody gives, or reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stage1_vae.decoders import Decoder, FactorisedDecoder, InterleavedDecoder
from stage1_vae.decoders.interleaved import Grid, GridNetwork
from stage1_vae.exact.networks import Convolution, Residual, activated, exact_network, upsampling

Choose = Callable[[Grid, Tensor], Tensor]
"""The numbers of a grid's pixels, int64 n h w c, given what the decoder says of them, n h w o."""


class ExactFactorised:
    """All pixels at once."""

    def __init__(self, decoder: FactorisedDecoder) -> None:
        self.network = exact_network(decoder.network)

    def walk(self, latents: Tensor, choose: Choose) -> Tensor:
        """Latents n d, float64 -> int64 n H W c."""
        return choose(Grid(0, 0, 1), self.network(latents))


class ExactGridNetwork:
    """`n h w i` -> `n h w width` and `n h w o`."""

    def __init__(self, network: GridNetwork) -> None:
        self.activation = network.activation
        self.first, self.last = Convolution(network.first), Convolution(network.last)
        self.layers = [Residual(layer) for layer in network.layers]  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        x = activated(x, self.activation)
        return x, self.last(x)


class ExactInterleaved:
    """Grid after grid, each given those before it."""

    def __init__(self, decoder: InterleavedDecoder, brightest: int) -> None:
        """brightest: the number of white."""
        self.image_size, self.channels = decoder.image_size, decoder.likelihood.channels
        self.grids, self.step = decoder.grids, 2 / brightest
        self.trunk = exact_network(decoder.trunk)
        self.networks = [ExactGridNetwork(network) for network in decoder.networks]  # type: ignore[arg-type]
        self.finer = [upsampling(Convolution(layer)) for layer in decoder.finer]  # type: ignore[arg-type]

    def walk(self, latents: Tensor, choose: Choose) -> Tensor:
        shape = (len(latents), *self.image_size, self.channels)
        numbers = torch.zeros(shape, dtype=torch.int64, device=latents.device)
        known: list[Tensor] = []  # float64 n h w c in [-1, 1], beside the grid that is next
        state = found = self.trunk(latents)
        for place, (grid, network) in enumerate(zip(self.grids, self.networks, strict=True)):
            if place % 3 == 1:  # the first of a level
                if place > 1:
                    state = self.finer[place // 3 - 1](found)
                known = [self.brightness(numbers[:, :: grid.step, :: grid.step])]
            found, outputs = network(torch.cat([state, *known], dim=-1))
            chosen = choose(grid, outputs)
            numbers[:, grid.row :: grid.step, grid.column :: grid.step] = chosen
            if place:
                known.append(self.brightness(chosen))
        return numbers

    def brightness(self, numbers: Tensor) -> Tensor:
        return numbers.double() * self.step - 1


DECODERS = (FactorisedDecoder, InterleavedDecoder)


def exact_decoder(decoder: Decoder | nn.Module, brightest: int) -> ExactFactorised | ExactInterleaved:
    if isinstance(decoder, InterleavedDecoder):
        return ExactInterleaved(decoder, brightest)
    assert isinstance(decoder, FactorisedDecoder)
    return ExactFactorised(decoder)
