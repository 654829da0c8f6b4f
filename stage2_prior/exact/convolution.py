"""Convolutions of several rows of places at once, and those of weight norm, in exact arithmetic."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common import exact
from common.exact import Product, rounded
from stage2_prior.priors.gated_convolutions import CausalConvolution, CodeConvolution, Convolution, GatedResidual


class RowsConvolution:
    """A convolution without padding and bias: b H W c -> b h w d.

    All places of a sample are on one grid, and so is all that multiplies them to one output. So the sum over the
    places that a kernel sees is exact, whatever its order."""

    def __init__(self, weight: Tensor):
        """weight: d c rows columns"""
        _, channels, self.rows, self.columns = weight.shape
        self.terms = channels * self.rows * self.columns
        on_grid = rounded(weight.detach().double().flatten(1), self.terms).view(weight.shape)
        self.taps = rearrange(on_grid, "d c rows columns -> rows columns c d").contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        batch, rows, columns, _ = x.shape
        height, width = rows - self.rows + 1, columns - self.columns + 1
        on_grid = rounded(x.flatten(1), self.terms).view(x.shape)
        total = x.new_zeros(batch * height * width, self.taps.shape[3])
        for row, taps in enumerate(self.taps):
            for column, tap in enumerate(taps):
                total += on_grid[:, row : row + height, column : column + width].flatten(0, 2) @ tap
        return total.view(batch, height, width, -1)


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


def padded(x: Tensor, convolution: Convolution) -> Tensor:
    """b h w c with zeros around."""
    return F.pad(x, (0, 0, *convolution.padding))


def convolved(x: Tensor, convolution: Convolution) -> Tensor:
    """b h w c -> b h w d"""
    return RowsConvolution(weight_of(convolution))(padded(x, convolution)).add_(bias_of(convolution))


def residual(x: Tensor, block: GatedResidual) -> Tensor:
    """A gated residual block of one input, b h w d -> b h w d."""
    hidden = convolved(exact.elu(x), block.first)
    return x + glu(convolved(exact.elu(hidden), block.second))


def convolved_codes(codes: Tensor, convolution: CodeConvolution) -> Tensor:
    """int64 b h w -> b h w d: what the weights of the codes that a place sees add to it, in raster order."""
    weights = rearrange(weight_of(convolution), "d k rows columns -> rows columns k d")
    table = F.pad(weights, (0, 0, 0, 1))  # no code has zeros
    outside = F.pad(codes, convolution.padding, value=convolution.vocabulary)
    _, height, width = codes.shape
    total = bias_of(convolution).expand(*codes.shape, -1).clone()
    for row, taps in enumerate(table):
        for column, tap in enumerate(taps):
            total += F.embedding(outside[:, row : row + height, column : column + width], tap)
    return total
