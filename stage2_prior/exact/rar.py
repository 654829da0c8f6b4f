"""The exact walk of `RAR`, in raster order."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.priors.rar import BEFORE, EPSILON, RAR, Block


class ExactRAR:
    """A `Stepper` of float64 logits that are the same on every machine. Start and class go one after the other."""

    @torch.inference_mode()
    def __init__(self, prior: RAR, batch: int, condition: Condition):
        prior.check(batch, condition)
        assert condition.order is None
        device = prior.embedding.weight.device
        classes, labels = prior.classes.weight.double(), condition.to(device).labels
        self.vectors = (classes[-1:].expand(batch, -1) if labels is None else classes[labels])[:, None]  # b 1 d
        self.embedding, self.places = prior.embedding.weight.double(), prior.places.double()
        self.targets, self.progress = prior.targets.double(), prior.progress.double()
        self.start = prior.start.double() + self.places[0]
        places = 1 + prior.grid.size
        self.blocks = [ExactBlock(block, batch, places) for block in cast("list[Block]", prior.blocks)]
        self.last, self.output = Product.of(prior.output_modulation), Product.of(prior.output)
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        position = self.position
        if previous is None:
            self.through(self.start.expand(len(self.vectors), -1, -1), 0)
            x = self.vectors + self.places[1]
        else:
            x = self.embedding[previous] + self.places[BEFORE + position - 1]
        self.position += 1
        x, condition = self.through(x + self.targets[position], 1 + position)
        scale, shift = self.last(condition).chunk(2, dim=-1)
        return self.output(modulated(exact.layer_norm(x, EPSILON), shift, scale))

    def through(self, x: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """x, b 1 d, at the next place, through all blocks; and what modulates it there."""
        condition = exact.silu(self.vectors + self.progress[place])
        for block in self.blocks:
            x = block(x, condition)
        return x, condition


class ExactBlock:
    """A block, with the keys and values of the places so far."""

    def __init__(self, block: Block, batch: int, places: int):
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.width = attention.out.in_features // self.heads
        self.modulation = Product.of(block.modulation)
        self.norms = [affine(norm) for norm in (block.attention_norm, block.feed_forward_norm)]
        self.query_norm, self.key_norm = affine(attention.query_norm), affine(attention.key_norm)
        self.qkv, self.out = Product.of(attention.qkv), Product.of(attention.out)
        self.up, self.down = Product.of(feed_forward.up), Product.of(feed_forward.down)
        self.attention = exact.Attention(batch * self.heads, places, self.width, attention.out.weight.device)

    def __call__(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition: b 1 d, at the next place."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        qkv = self.qkv(modulated(normalised(x, self.norms[0]), shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # b heads 1 d
        queries = normalised(queries, self.query_norm).mul_(1 / math.sqrt(self.width))
        self.attention.add(normalised(keys, self.key_norm).flatten(0, 1), values.flatten(0, 1))
        attended = self.attention(queries.flatten(0, 1)).unflatten(0, (-1, self.heads))
        x = x + self.out(attended.transpose(1, 2).flatten(2)).mul_(gate1)
        opened = self.up(modulated(normalised(x, self.norms[1]), shift2, scale2))
        return x + self.down(exact.gelu(opened)).mul_(gate2)


def affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight.double(), norm.bias.double()


def normalised(x: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
    """Layer norm of the last axis."""
    gain, bias = affine
    return exact.layer_norm(x, EPSILON).mul_(gain).add_(bias)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (scale + 1).mul_(x).add_(shift)
