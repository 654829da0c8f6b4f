"""Convolutions in exact arithmetic, and those of weight norm with the blocks made of them."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common import exact
from common.exact import Product, factors_of, product_of
from stage2_prior.priors.gated_convolutions import CausalConvolution, CodeConvolution, Convolution, GatedResidual


class Taps:
    """A convolution, tap by tap: each place has a grid of its own, and what the taps make of the places that a kernel
    sees is added up in raster order. Beyond the rows and columns that there are, nothing is added."""

    def __init__(self, weight: Tensor):
        """weight: d c rows columns"""
        taps = rearrange(weight.detach().double(), "d c rows columns -> rows columns d c").contiguous()
        self.taps = factors_of(taps).mT

    def add_to(self, total: Tensor, factors: Tensor, rows_before: int, columns_before: int) -> None:
        """To h w b d, from `factors_of` H W b c. The first place of `total` sees as many rows and
        columns before the first of them."""
        for row, taps in enumerate(self.taps):
            rows, seen_rows = overlap(row - rows_before, len(factors), len(total))
            for column, tap in enumerate(taps):
                columns, seen_columns = overlap(column - columns_before, factors.shape[1], total.shape[1])
                here, seen = total[rows, columns], factors[seen_rows, seen_columns]
                here.add_(product_of(seen.flatten(0, 2), tap).view_as(here))


def overlap(shift: int, there: int, seeing: int) -> tuple[slice, slice]:
    """Which of so many places see one of those that are there, `shift` further on, and which ones they see."""
    first = max(0, -shift)
    last = max(first, min(seeing, there - shift))
    return slice(first, last), slice(first + shift, last + shift)


def weight_of(convolution: Convolution) -> Tensor:
    """`convolution.weight()`, d c rows columns."""
    direction = convolution.direction.detach().double()
    if isinstance(convolution, CausalConvolution):
        direction = direction * convolution.visible.double()
    flat = direction.flatten(1)
    lengths = exact.square_root(exact.mean_square(flat) * flat.shape[1])  # d 1
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
    rows, columns = convolution.kernel_size
    Taps(weight_of(convolution)).add_to(total, factors_of(x), rows // 2, columns // 2)
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
