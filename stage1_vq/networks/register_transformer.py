"""The transformer of FlexTok (Bachmann et al. 2025, arXiv:2502.13967): patches and registers in one row of tokens.

Linear layers have no biases and norms no weights, queries and keys have a norm of their own in each head, and logits of
attention are 8 / d of their product, d the width of a head (Yang et al. 2022, arXiv:2203.03466): the usual 1 / sqrt(d)
where d is 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

PERIODS = 10_000  # of the slowest of the sines that tell a place, to the fastest
SMALL = 0.1  # of the usual size, what scales, shifts and gates begin with: at first a block changes little


def normalised(x: Tensor) -> Tensor:
    """To mean 0 and variance 1 over the last axis."""
    return F.layer_norm(x, x.shape[-1:])


def places_of(height: int, width: int, channels: int) -> Tensor:
    """(height width) channels: of each place sines and cosines of its row, then of its column, of many periods. A
    quarter of the channels each."""
    rates = PERIODS ** -(torch.arange(channels // 4) / (channels // 4))
    rows, columns = (torch.arange(side).unsqueeze(1) * rates for side in (height, width))
    of_rows, of_columns = (torch.cat([angles.sin(), angles.cos()], 1) for angles in (rows, columns))
    halves = of_rows.repeat_interleave(width, 0), of_columns.repeat(height, 1)
    return torch.cat(halves, 1)


def causal_last(patches: int, registers: int) -> Tensor:
    """Which token (row) sees which (column), bool: all see the patches, and registers those before them and themselves
    too; patches do not see registers."""
    count = patches + registers
    sees = torch.ones(count, count, dtype=torch.bool).tril()
    sees[:, :patches] = True
    return sees


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, sees: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "b n (heads d) -> b heads n d", heads=self.heads)
            for layer in (self.query, self.key, self.value)
        )
        q, k = (normalised(each).to(v.dtype) for each in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, sees, scale=8 / q.shape[-1])
        return self.output(rearrange(attended, "b heads n d -> b n (heads d)"))


class SwiGLU(nn.Module):
    """An MLP with gates (Shazeer 2020, arXiv:2002.05202), as large as one of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = 8 * width // 3
        self.gate, self.inner = (nn.Linear(width, inside, bias=False) for _ in range(2))
        self.outer = nn.Linear(inside, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.gate(x)) * self.inner(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width)

    def forward(self, x: Tensor, sees: Tensor | None = None) -> Tensor:
        """b n d. sees: n n, bool, which token (row) attends to which; None: all to all."""
        x = x + self.attention(normalised(x), sees)
        return x + self.mlp(normalised(x))


class TimedBlock(nn.Module):
    """A block whose norms are scaled and shifted, and what it adds is scaled, by a vector that tells the time (DiT,
    Peebles & Xie 2023, arXiv:2212.09748), of patches and of registers otherwise.

    Gates begin near 1 and not at 0, as DiT's do: with those the registers hardly reach the first velocities, and have
    hardly a gradient.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width)
        self.modulation = nn.Linear(width, 2 * 6 * width)

    def forward(self, x: Tensor, time: Tensor, registers: int) -> Tensor:
        """x: b n d, patches first, then so many registers; time: b d."""
        values = rearrange(self.modulation(F.silu(time)), "b (two six d) -> six two b 1 d", two=2, six=6)
        patches = x.shape[1] - registers
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = (
            torch.cat([first.expand(-1, patches, -1), last.expand(-1, registers, -1)], 1) for first, last in values
        )
        x = x + (1 + gate_1) * self.attention(normalised(x) * (1 + scale_1) + shift_1, None)
        return x + (1 + gate_2) * self.mlp(normalised(x) * (1 + scale_2) + shift_2)
