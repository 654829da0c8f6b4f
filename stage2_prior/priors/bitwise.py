"""Codes by their bits, for large vocabularies: Infinity's classifier (Han et al. 2024, arXiv:2412.04431, section 3.3).

A vocabulary of 2^d codes, such as those of LFQ and BSQ, whose bits are signs of latents, takes d vectors to embed a
code and 2 d logits to tell it, each bit by itself: 36 in the place of 262,144 for 18 bits. Bits are those of a code's
number, the least first. Given the codes before, they do not depend on each other: which of two codes it is, if those
differ in several bits, cannot be said.

    log p(code) = sum over j of log softmax(logits 2j, 2j + 1)[bit j of the code]

The same is the softmax over all codes of the sum of what their bits add: a table of all codes, made when sampling wants
one, and never in training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.spec import Grid
from common.errors import UserError


def bits_of_vocabulary(grid: Grid) -> int:
    """d. Raises UserError unless the grid's codes are all numbers of so many bits."""
    bits = grid.vocabulary.bit_length() - 1
    if grid.vocabulary != 2**bits or bits < 1:
        raise UserError(
            f"bitwise for codes of {grid.vocabulary}, expected a power of two, as quantizers of bits have it; leave "
            "bitwise out, or take an autoencoder of quantizer.kind=lfq or bsq"
        )
    return bits


def bits_of(codes: Tensor, bits: int) -> Tensor:
    """int64 `... d`, 0 or 1, the least first."""
    return codes[..., None] >> torch.arange(bits, device=codes.device) & 1


def nll_of_bits(logits: Tensor, codes: Tensor) -> Tensor:
    """Nats of each code, `...` float32, from logits `... 2d`: of each bit, that it is 0 and that it is 1."""
    pairs = logits.float().unflatten(-1, (-1, 2))  # ... d 2
    right = bits_of(codes, pairs.shape[-2]) == 1
    ahead = pairs[..., 1] - pairs[..., 0]
    return F.softplus(torch.where(right, -ahead, ahead)).sum(dim=-1)


def logits_of_codes(logits: Tensor) -> Tensor:
    """Of all codes, `... 2^d`, from those of their bits, `... 2d`: of each, that it is 0 and that it is 1. In float32,
    or float64 where they are."""
    pairs = (logits if logits.dtype == torch.float64 else logits.float()).unflatten(-1, (-1, 2))
    total = torch.zeros_like(pairs[..., :1, 0])
    for ahead in (pairs[..., 1] - pairs[..., 0]).split(1, dim=-1):  # each bit doubles the table
        total = torch.cat([total, total + ahead], dim=-1)
    return total


class OfBits(nn.Module):
    """What is a sum of what the bits of a code add, 0 or 1 times a vector of each."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def per_bit(self) -> Tensor:
        """`d width`"""
        raise NotImplementedError

    def table(self, dtype: torch.dtype | None = None) -> Tensor:
        """Of all codes, `2^d width`. Bit after bit, so that in float64 it is the same on every machine."""
        vectors = self.per_bit() if dtype is None else self.per_bit().to(dtype)
        total = vectors.new_zeros(1, vectors.shape[1])
        for vector in vectors:  # each doubles the table
            total = torch.cat([total, total + vector])
        return total

    @property
    def weight(self) -> Tensor:
        return self.table()


class BitEmbedding(OfBits):
    """Vectors of codes, `...` -> `... width`: one of all, and one of each bit that is 1."""

    def __init__(self, bits: int, width: int):
        super().__init__(bits)
        self.vectors = nn.Parameter(torch.empty(bits, width))
        self.start = nn.Parameter(torch.empty(1, width))

    def per_bit(self) -> Tensor:
        return self.vectors

    def table(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().table(dtype) + self.start.to(dtype or self.start.dtype)

    def forward(self, codes: Tensor) -> Tensor:
        return bits_of(codes, self.bits).to(self.vectors.dtype) @ self.vectors + self.start


class BitOutput(OfBits):
    """`... width` -> logits of all codes, `... 2^d`; in training `pairs`."""

    def __init__(self, width: int, bits: int):
        super().__init__(bits)
        self.vectors = nn.Parameter(torch.empty(2 * bits, width))  # of each bit, that it is 0 and that it is 1

    def per_bit(self) -> Tensor:
        return self.vectors[1::2] - self.vectors[::2]

    def pairs(self, states: Tensor) -> Tensor:
        """`... 2d`"""
        return F.linear(states, self.vectors)

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.table())
