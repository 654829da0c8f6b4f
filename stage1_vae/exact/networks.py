"""The networks of VAEs in exact arithmetic: places come before channels, `n h w c`.

A convolution is a linear layer of what its kernel sees of an image, which is zero beyond the border. An image has one
grid for all its places, so that the sums over a kernel are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common import exact
from common.exact import FINE, Product, factors_of, on_grid, product_of
from stage1_vae.networks import ConvolutionalDecoder, ConvolutionalEncoder, DenseDecoder, DenseEncoder
from stage1_vae.networks.convolutional import Downsampling, ResidualBlock, Upsampling
from stage1_vae.networks.dense import DenseLayers

SEEN_AT_ONCE = 2**20  # numbers that the kernels of a convolution see, of as many images as are taken at a time


def activated(x: Tensor, activation: nn.Module) -> Tensor:
    """x changes where the function can be computed in its place."""
    if isinstance(activation, nn.ReLU):
        return x.clamp_(min=0)
    if isinstance(activation, nn.Tanh):
        return exact.tanh(x)
    if isinstance(activation, nn.ELU):
        return exact.elu(x)
    if isinstance(activation, nn.SiLU):
        return exact.silu(x)
    if isinstance(activation, nn.Softplus):
        return exact.softplus(x)
    raise AssertionError(activation)


class ExactDense:
    """`n inputs` -> `n outputs`."""

    def __init__(self, network: DenseLayers) -> None:
        self.skip, self.activation = network.skip, network.activation
        self.products = [Product.of(layer) for layer in layers_of(network.layers, nn.Linear)]

    def __call__(self, x: Tensor) -> Tensor:
        hidden = x
        for place, product in enumerate(self.products):
            if place:
                hidden = activated(hidden, self.activation)
                hidden = torch.cat([hidden, x], dim=-1) if self.skip else hidden
            hidden = product(hidden)
        return hidden


class Convolution:
    """`n h w c` -> `n h w d`, or of half the height and width for a stride of 2."""

    def __init__(self, layer: nn.Conv2d) -> None:
        weight = layer.weight.detach().double()
        self.matrix = factors_of(rearrange(weight, "d c rows columns -> d (rows columns c)")).t().contiguous()
        assert layer.bias is not None
        self.bias = layer.bias.detach().double()
        self.side, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])

    def __call__(self, x: Tensor) -> Tensor:
        places = x.shape[1] * x.shape[2] // self.stride**2
        images = max(1, SEEN_AT_ONCE // (places * len(self.matrix)))
        return torch.cat([self.of_some(some) for some in x.split(images)])

    def of_some(self, x: Tensor) -> Tensor:
        factors = on_grid(x.flatten(1), FINE.bits).view(x.shape)
        edge, side = self.padding, self.side
        if side > 1:
            outside = F.pad(factors, (0, 0, edge, edge, edge, edge))
            seen = outside.unfold(1, side, self.stride).unfold(2, side, self.stride)
            factors = rearrange(seen, "n h w c rows columns -> n h w (rows columns c)")
        found = product_of(factors.flatten(0, 2), self.matrix).add_(self.bias)
        return found.view(*factors.shape[:3], -1)


class Residual:
    """`n h w c` -> `n h w c`."""

    def __init__(self, block: ResidualBlock) -> None:
        self.activation, self.first, self.second = block.activation, Convolution(block.first), Convolution(block.second)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = activated(self.first(activated(x.clone(), self.activation)), self.activation)
        return self.second(hidden).add_(x)


def upsampling(convolution: Convolution) -> Callable[[Tensor], Tensor]:
    def larger(x: Tensor) -> Tensor:
        found = convolution(x)
        return rearrange(found, "n h w (d rows columns) -> n (h rows) (w columns) d", rows=2, columns=2)

    return larger


def layers_of(modules: Sequence[nn.Module] | nn.ModuleList, kind: type) -> list:
    """The modules, all of which are of one type."""
    assert all(isinstance(module, kind) for module in modules)
    return list(modules)


def steps_of(layers: nn.ModuleList) -> list[Callable[[Tensor], Tensor]]:
    return [
        Residual(layer)
        if isinstance(layer, ResidualBlock)
        else Convolution(layer.convolution)
        if isinstance(layer, Downsampling)
        else upsampling(Convolution(cast(Upsampling, layer).convolution))
        for layer in layers
    ]


class ExactConvolutionalEncoder:
    """Images `n h w c` in [-1, 1] -> `n features`, or `n h w features` where latents are a map."""

    def __init__(self, network: ConvolutionalEncoder) -> None:
        self.first, self.steps = Convolution(network.first), steps_of(network.layers)
        self.activation, self.map = network.activation, network.map
        self.last = Convolution(network.last) if isinstance(network.last, nn.Conv2d) else Product.of(network.last)

    def __call__(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for step in self.steps:
            x = step(x)
        x = activated(x, self.activation)
        return self.last(x if self.map else rearrange(x, "n h w c -> n (c h w)"))


class ExactConvolutionalDecoder:
    """Latents `n d`, or `n h w d` of a map, -> `n H W o`."""

    def __init__(self, network: ConvolutionalDecoder) -> None:
        def layer(module: nn.Module) -> Product | Convolution:
            return Convolution(module) if isinstance(module, nn.Conv2d) else Product.of(module)  # type: ignore[arg-type]

        self.lowest_size, self.map, self.activation = network.lowest_size, network.map, network.activation
        self.first, self.steps, self.last = layer(network.first), steps_of(network.layers), Convolution(network.last)
        self.skips = [layer(module) for module in network.skips]

    def __call__(self, latents: Tensor) -> Tensor:
        x = self.first(latents)
        if not self.map:
            x = rearrange(x, "n (c h w) -> n h w c", h=self.lowest_size[0], w=self.lowest_size[1]).contiguous()
        for place, step in enumerate(self.steps):
            x = step(self.with_latents(x, latents, place))
        x = self.with_latents(x, latents, len(self.steps))
        return self.last(activated(x, self.activation))

    def with_latents(self, x: Tensor, latents: Tensor, place: int) -> Tensor:
        if not self.skips:
            return x
        told = self.skips[place](latents)
        if not self.map:
            return x + told[:, None, None]
        times = x.shape[1] // told.shape[1]
        return x + told.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)


Network = Callable[[Tensor], Tensor]


def exact_encoder(network: nn.Module) -> Network:
    """Images `n h w c` of whole numbers from 0 to 255, int64, -> `n features`, those of a map in the order of
    `flatten`: channel after channel, each in raster order."""
    if isinstance(network, DenseEncoder):
        dense = ExactDense(network.layers)
        return lambda images: dense(rearrange(images, "n h w c -> n (c h w)").double() * (1 / 255))
    assert isinstance(network, ConvolutionalEncoder)
    encoder = ExactConvolutionalEncoder(network)

    def features(images: Tensor) -> Tensor:
        found = encoder(images.double() * (1 / 127.5) - 1)
        return rearrange(found, "n h w c -> n (c h w)") if encoder.map else found

    return features


def exact_network(network: nn.Module) -> Network:
    """Of a decoder: latents `n d`, those of a map in the order of `flatten`, float64, -> `n H W o`."""
    if isinstance(network, DenseDecoder):
        dense, (_, height, width) = ExactDense(network.layers), network.output_shape
        return lambda latents: rearrange(dense(latents), "n (o h w) -> n h w o", h=height, w=width)
    assert isinstance(network, ConvolutionalDecoder)
    decoder = ExactConvolutionalDecoder(network)
    if not decoder.map:
        return decoder
    height, width = decoder.lowest_size
    return lambda latents: decoder(rearrange(latents, "n (d h w) -> n h w d", h=height, w=width).contiguous())
