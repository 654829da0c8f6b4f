"""The exact walk of `IBQGPT`."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.exact.llamagen import normalised, place_turns
from stage2_prior.exact.transformer import turned
from stage2_prior.exact.var import modulation
from stage2_prior.priors.ibq_gpt import IBQGPT, Block


class ExactIBQGPT:
    """A `Stepper` of float64 logits that are the same on every machine."""

    @torch.inference_mode()
    def __init__(self, prior: IBQGPT, batch: int, condition: Condition):
        prior.check(batch, condition)
        device = prior.embedding.weight.device
        classes, labels = prior.classes.weight.double(), condition.to(device).labels
        vectors = classes[-1:].expand(batch, -1) if labels is None else classes[labels]  # b d
        self.start = vectors[:, None]
        self.embedding = prior.embedding.weight.double()
        self.turns = place_turns(prior.grid, 1, prior.network.head_width, device)
        activated, places = exact.silu(vectors), prior.grid.size
        self.blocks = [ExactBlock(block, activated, places) for block in cast("list[Block]", prior.blocks)]
        self.gain = prior.norm.weight.double()
        self.last = modulation(prior.output_modulation, activated).unbind(2)
        self.output = Product.of(prior.output)
        self.place = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        x = self.start if previous is None else self.embedding[previous]
        cosine, sine = (part[self.place : self.place + 1] for part in self.turns)
        for block in self.blocks:
            x = block(x, cosine, sine)
        self.place += 1
        return self.output(modulated(x, self.gain, *self.last))


class ExactBlock:
    """A block with the modulation of its samples, and the keys and values of the places so far."""

    def __init__(self, block: Block, activated: Tensor, places: int):
        """activated: class vectors behind their SiLU, b d."""
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.width = attention.out.in_features // self.heads
        self.modulation = modulation(block.modulation, activated).unbind(2)
        self.gains = block.attention_norm.weight.double(), block.feed_forward_norm.weight.double()
        self.qkv, self.out = Product.of(attention.qkv), Product.of(attention.out)
        self.gate_up, self.down = Product.of(feed_forward.gate_up), Product.of(feed_forward.down)
        self.attention = exact.Attention(len(activated) * self.heads, places, self.width, activated.device)

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x: b 1 d, at the next place; cosine, sine: 1 d/2, of its turns."""
        gain1, gain2, scale1, scale2, shift1, shift2 = self.modulation  # b 1 d
        qkv = self.qkv(modulated(x, self.gains[0], scale1, shift1)).unflatten(-1, (3, self.heads, self.width))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # b heads 1 d
        queries, keys = (turned(part, cosine, sine).flatten(0, 1) for part in (queries, keys))
        self.attention.add(keys, values.flatten(0, 1))
        attended = self.attention(queries.mul_(1 / math.sqrt(self.width))).unflatten(0, (-1, self.heads))
        x = x + self.out(attended.transpose(1, 2).flatten(2)).mul_(gain1)
        gate, up = self.gate_up(modulated(x, self.gains[1], scale2, shift2)).chunk(2, dim=-1)
        return x + self.down(exact.silu(gate).mul_(up)).mul_(gain2)


def modulated(x: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """RMSNorm of the last axis with its gain, then as `ibq_gpt.modulated`."""
    return normalised(x).mul_(gain).mul_(scale + 1).add_(shift)
