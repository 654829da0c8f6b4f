"""The exact walk of `MinGPT`."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.priors.mingpt import Block, MinGPT


class ExactMinGPT:
    """A `Stepper` of float64 logits that are the same on every machine. What comes before the codes goes through at the
    first call, all at once."""

    @torch.inference_mode()
    def __init__(self, prior: MinGPT, batch: int, condition: Condition):
        prior.check(batch, condition)
        device = prior.positions.device
        self.before = prior.prefix(batch, condition.to(device))  # b p, numbers
        self.hidden = torch.ones(prior.prefix_length, prior.prefix_length, dtype=torch.bool, device=device).triu_(1)
        self.hidden[: prior.config.unmasked, : prior.config.unmasked] = False
        self.embedding, self.positions = prior.embedding.weight.double(), prior.positions.double()
        places = prior.prefix_length + prior.grid.size - 1
        self.blocks = [ExactBlock(block, batch, places) for block in cast("list[Block]", prior.blocks)]
        self.norm = ExactNorm(prior.norm)
        self.output = Product(prior.output.weight[: prior.grid.vocabulary])
        self.place = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        numbers, hidden = (self.before, self.hidden) if previous is None else (previous, None)
        here = slice(self.place, self.place + numbers.shape[1])
        x = self.embedding[numbers] + self.positions[here]
        for block in self.blocks:
            x = block(x, hidden)
        self.place = here.stop
        return self.output(self.norm(x[:, -1:]))


class ExactBlock:
    """A block, with the keys and values of the places so far."""

    def __init__(self, block: Block, batch: int, places: int):
        self.heads = block.attention.heads
        self.width = block.attention.out.in_features // self.heads
        self.attention_norm, self.feed_forward_norm = (
            ExactNorm(block.attention_norm),
            ExactNorm(block.feed_forward_norm),
        )
        self.qkv, self.out = Product.of(block.attention.qkv), Product.of(block.attention.out)
        self.up, self.down = Product.of(block.up), Product.of(block.down)
        self.attention = exact.Attention(batch * self.heads, places, self.width, block.down.weight.device)

    def __call__(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """x: b m d, at the next m places; hidden: m n, True where one of them does not see one of the n up to them."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, self.width))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (b heads) m d
        self.attention.add(keys, values)
        attended = self.attention(queries * (1 / math.sqrt(self.width)), hidden)
        x = x + self.out(attended.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))
        return x + self.down(exact.gelu(self.up(self.feed_forward_norm(x))))


class ExactNorm:
    """A layer norm with gain and bias."""

    def __init__(self, norm: nn.LayerNorm):
        self.epsilon, self.gain, self.bias = norm.eps, norm.weight.double(), norm.bias.double()

    def __call__(self, x: Tensor) -> Tensor:
        return exact.layer_norm(x, self.epsilon).mul_(self.gain).add_(self.bias)
