"""Convolutions in exact arithmetic, and those of weight norm with the blocks made of them."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common import exact
from common.exact import Product, rounded
from stage2_prior.priors.gated_convolutions import CausalConvolution, CodeConvolution, Convolution, GatedResidual


class Taps:
    """A convolution, tap by tap: each place has a grid of its own, and what the taps make of the places that a kernel
    sees is added up in raster order."""

    def __init__(self, weight: Tensor):
        """weight: d c rows columns"""
        taps = rearrange(weight.detach().double(), "d c rows columns -> rows columns d c").contiguous()
        self.taps = rounded(taps, taps.shape[3]).mT

    def add_to(self, total: Tensor, on_grid: Tensor) -> None:
        """To h w b d, from what its kernels see, H W b c, each place `rounded` already."""
        height, width, _, out = total.shape
        flat = total.view(-1, out)
        for row, taps in enumerate(self.taps):
            for column, tap in enumerate(taps):
                flat += on_grid[row : row + height, column : column + width].flatten(0, 2) @ tap


def weight_of(convolution: Convolution) -> Tensor:
    """`convolution.weight()`, d c rows columns."""
    direction = convolution.direction.detach().double()
    if isinstance(convolution, CausalConvolution):
        direction = direction * convolution.visible.double()
    flat = direction.flatten(1)
    lengths = (exact.mean_square(flat) * flat.shape[1]).sqrt_()  # d 1
    return (flat * (convolution.gain.detach().double().flatten(1) / lengths)).view(direction.shape)


def bias_of(convolution: Convolution) -> Tensor:
    return cast(Tensor, convolution.bias).detach().double()


def product(convolution: Convolution) -> Product:
    """Of a 1x1 convolution, `... c` -> `... d`."""
    bias = None if convolution.bias is None else bias_of(convolution)
    return Product(weight_of(convolution).flatten(1), bias)


def glu(x: Tensor) -> Tensor:
    """Over the last axis."""
    signal, opening = x.chunk(2, dim=-1)
    return exact.sigmoid(opening).mul_(signal)


class PlaceResidual:
    """A gated residual block of 1x1 convolutions: b d -> b d."""

    def __init__(self, block: GatedResidual):
        self.first, self.second = product(block.first), product(block.second)
        self.side = None if block.side is None else product(block.side)

    def __call__(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        """side: the second input, b c."""
        hidden = self.first(exact.elu(x))
        if self.side is not None and side is not None:
            hidden += self.side(exact.elu(side))
        return x + glu(self.second(exact.elu(hidden)))


# ---- of whole grids -------------------------------------------------------------------------------------------------


def convolved(x: Tensor, convolution: Convolution) -> Tensor:
    """h w b c -> h w b d"""
    total = bias_of(convolution).repeat(*x.shape[:-1], 1)
    on_grid = F.pad(rounded(x, x.shape[3]), (0, 0, 0, 0, *convolution.padding))
    Taps(weight_of(convolution)).add_to(total, on_grid)
    return total


def residual(x: Tensor, block: GatedResidual) -> Tensor:
    """A gated residual block of one input, h w b d -> h w b d."""
    hidden = convolved(exact.elu(x), block.first)
    return x + glu(convolved(exact.elu(hidden), block.second))


def convolved_codes(codes: Tensor, convolution: CodeConvolution) -> Tensor:
    """int64 h w b -> h w b d: what the weights of the codes that a place sees add to it, in raster order."""
    height, width, _ = codes.shape
    weights = rearrange(weight_of(convolution), "d k rows columns -> rows columns k d")
    table = F.pad(weights, (0, 0, 0, 1))  # no code has zeros
    outside = F.pad(codes, (0, 0, *convolution.padding), value=convolution.vocabulary)
    total = bias_of(convolution).repeat(*codes.shape, 1)
    for row, taps in enumerate(table):
        for column, tap in enumerate(taps):
            total += F.embedding(outside[row : row + height, column : column + width], tap)
    return total
