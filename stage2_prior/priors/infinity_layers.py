"""Infinity's layers (infinity.py) and their sizes: VAR's blocks, in which places also ask the words of a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from stage2_prior.priors.llamagen import turn
from stage2_prior.priors.sentence import CrossAttention
from stage2_prior.priors.var import Attention, FeedForward, Offsets, VARConfig, modulated

EPSILON = 1e-6  # of every norm, inside the root


@dataclass(frozen=True, kw_only=True)
class InfinityConfig:
    """The published models have 32 layers, width=2048 and heads=16 (2B), and below that 12 layers, width=768 and
    heads=8, up to 48, 3360 and 28; drop_path=0.1, coarse_weight=0.5, initial_gain=5e-6."""

    kind: Literal["infinity"] = "infinity"
    layers: int = 8
    width: int = 512  # d
    heads: int = 8  # each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    mlp_ratio: float = 4.0  # width inside a feed-forward layer, as a multiple of d
    class_words: int = 4  # of the sentence that a class stands for
    dropout: float = 0.0  # of what attention and feed-forward add to the residual stream
    drop_path: float = 0.0  # share of samples for which the last block adds nothing; rises to it from 0 at the first
    coarse_weight: float = 0.0  # a code counts in the loss by the last grid's places per its own, to this power
    initial_gain: float = 1e-5  # of what a block adds to the residual stream, as a factor of its usual start

    def __post_init__(self) -> None:
        _ = self.network  # refuses impossible sizes
        if self.width % (4 * self.heads):
            raise UserError(
                f"width={self.width} with heads={self.heads}, expected a width that is a multiple of "
                f"{4 * self.heads}: each head turns pairs of numbers by the row and pairs by the column"
            )
        if self.class_words < 1:
            raise UserError(f"class_words={self.class_words}, expected at least 1")
        if not 0 <= self.coarse_weight < math.inf:
            raise UserError(f"coarse_weight={self.coarse_weight}, expected 0 (all codes alike) or more; published: 0.5")

    @property
    def network(self) -> VARConfig:
        """The sizes as VAR's layers want them."""
        return VARConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            shared_adaln=True,
            dropout=self.dropout,
            drop_path=self.drop_path,
            mlp_ratio=self.mlp_ratio,
            initial_gain=self.initial_gain,
        )


class Asked(NamedTuple):
    """A sentence as the network takes it."""

    vector: Tensor  # b d, the start, and what modulates the norms
    words: Tensor  # b t d
    mask: Tensor | None  # b 1 1 t


class Reading(nn.Module):
    """Places ask the words of the sentence."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, EPSILON)
        self.q = nn.Linear(config.width, config.width)
        self.words = CrossAttention(config.width, config.width, config.heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x: b n d."""
        q = rearrange(self.q(self.norm(x)), "b n (heads d) -> b heads n d", heads=self.words.heads)
        return self.words.attend(q, keys, values, mask)


class Block(nn.Module):
    def __init__(self, config: VARConfig):
        super().__init__()
        self.modulation = Offsets(config.width)
        self.attention = Attention(config)
        self.reading = Reading(config)
        self.feed_forward = FeedForward(config.width, config.mlp_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        shared: Tensor,
        asked: Asked,
        turns: Tensor,
        mask: Tensor,
        kept: Tensor | tuple[float, float] = (1.0, 1.0),
    ) -> Tensor:
        """x: b n d; shared: the modulation that blocks have in common, b 1 6 d; turns: n d_head/2; mask: n n; kept: by
        what the two paths of each sample are multiplied, 2 b 1 1."""
        gain1, gain2, scale1, scale2, shift1, shift2 = self.modulation(shared).unbind(2)
        q, k, v = self.attention.project(modulated(x, scale1, shift1))
        attended = self.attention.attend(turn(q, turns), turn(k, turns), v, mask)
        x = x + kept[0] * gain1 * self.dropout(attended)
        x = x + self.dropout(self.reading(x, *self.reading.words.keys_and_values(asked.words), asked.mask))
        return x + kept[1] * gain2 * self.dropout(self.feed_forward(modulated(x, scale2, shift2)))
