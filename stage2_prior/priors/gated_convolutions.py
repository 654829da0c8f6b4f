"""The parts of PixelSNAIL: convolutions with weight norm (Salimans & Kingma 2016, arXiv:1602.07868), also of codes, the
gated residual block made of them, and the features of places."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Grid


class Convolution(nn.Module):
    """b c h w -> b d h w, the same size. The weight is a direction, scaled to the length `gain`."""

    def __init__(self, channels: int, width: int, kernel_size: int | tuple[int, int] = 1, bias: bool = True):
        super().__init__()
        rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        fresh = nn.Conv2d(channels, width, (rows, columns), bias=bias)
        self.kernel_size = rows, columns
        self.padding = columns // 2, columns // 2, rows // 2, rows // 2  # columns before and after, rows likewise
        self.direction = nn.Parameter(fresh.weight.detach())
        self.gain = nn.Parameter(lengths(fresh.weight.detach()))
        self.bias = None if fresh.bias is None else nn.Parameter(fresh.bias.detach())

    def weight(self) -> Tensor:
        """d c rows columns"""
        return self.direction * (self.gain / lengths(self.direction))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.padding), self.weight(), self.bias)


def lengths(direction: Tensor) -> Tensor:
    """Of the weights of each output channel: d 1 1 1."""
    return torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True)


class CausalConvolution(Convolution):
    """Sees the rows above, up to `kernel_size - 1` of them, and what is left of the position in its own row; the
    position itself it does not see."""

    visible: Tensor

    def __init__(self, channels: int, width: int, kernel_size: int):
        super().__init__(channels, width, kernel_size)
        reach = kernel_size // 2
        self.padding = reach, reach, kernel_size - 1, 0
        visible = torch.ones(kernel_size, kernel_size)
        visible[-1, reach:] = 0
        self.register_buffer("visible", visible, persistent=False)

    def weight(self) -> Tensor:
        direction = self.direction * self.visible.to(self.direction.dtype)  # of a loaded model it is float32
        return direction * (self.gain / lengths(direction))


class CodeConvolution(Convolution):
    """A convolution of one-hot codes, int64 b h w -> b d h w: weights are looked up where a product would multiply
    nearly all of them by zero. A code equal to the vocabulary is no code; there are such outside the grid."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        kernel_size: int | tuple[int, int],
        padding: tuple[int, int, int, int] | None = None,
    ):
        """padding: columns before and after, rows likewise, where it is not centred."""
        super().__init__(vocabulary, width, kernel_size)
        self.vocabulary = vocabulary
        self.padding = self.padding if padding is None else padding

    def forward(self, codes: Tensor) -> Tensor:
        rows, columns = self.kernel_size
        windows = F.pad(codes, self.padding, value=self.vocabulary).unfold(1, rows, 1).unfold(2, columns, 1)
        weights = rearrange(self.weight(), "d k rows columns -> (rows columns) k d")
        table = F.pad(weights, (0, 0, 0, 1))  # no code has zeros
        first = torch.arange(len(table), device=codes.device) * table.shape[1]  # row of each tap
        places = rearrange(windows, "b h w rows columns -> (b h w) (rows columns)") + first
        summed = F.embedding_bag(places, table.flatten(0, 1), mode="sum") + cast(Tensor, self.bias)
        return rearrange(summed, "(b h w) d -> b d h w", b=len(codes), h=windows.shape[1]).contiguous()


class GatedResidual(nn.Module):
    """b d h w -> b d h w: what two convolutions make of the input, behind a gate, is added to it."""

    def __init__(
        self,
        width: int,
        hidden_width: int,
        convolution: Callable[[int, int], Convolution],
        dropout: float,
        side_width: int = 0,
    ):
        """convolution: from the channels before and after to one. side_width: channels of a second input, if any."""
        super().__init__()
        self.first = convolution(width, hidden_width)
        self.side = Convolution(side_width, hidden_width) if side_width else None
        self.dropout = nn.Dropout(dropout)
        self.second = convolution(hidden_width, 2 * width)

    def forward(self, x: Tensor, side: Tensor | None = None, gate_bias: Tensor | None = None) -> Tensor:
        """side: the second input, b side_width h w; gate_bias: b 2d h w, added before the gate."""
        hidden = self.first(F.elu(x))
        if self.side is not None and side is not None:
            hidden = hidden + self.side(F.elu(side))
        gates = self.second(self.dropout(F.elu(hidden)))
        return x + F.glu(gates if gate_bias is None else gates + gate_bias, dim=1)


def place_features(grid: Grid, like: Tensor) -> Tensor:
    """Row and column of each place, from -1/2 to below 1/2: 2 h w, of the type and device of `like`."""
    rows, columns = (torch.arange(n, device=like.device) / n - 0.5 for n in (grid.height, grid.width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(like.dtype)
