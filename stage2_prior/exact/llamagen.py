"""The exact walk of `LlamaGen`."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Grid
from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.exact.transformer import turned
from stage2_prior.priors.llamagen import EPSILON, ROPE_BASE, Block, CaptionEmbedding, LlamaGen


class ExactLlamaGen:
    """A `Stepper` of float64 logits that are the same on every machine. What comes before the codes goes through at the
    first call, all at once."""

    @torch.inference_mode()
    def __init__(self, prior: LlamaGen, batch: int, condition: Condition):
        config, device = prior.config, prior.embedding.weight.device
        prior.check(batch, condition)
        condition = condition.to(device)
        self.embedding = prior.embedding.weight.double()
        self.before = prefix(prior, batch, condition)  # b p d
        self.turns = place_turns(prior.grid, prior.prefix_length, config.head_width, device)
        self.counts: Tensor | None = None  # b p, which places before the codes are seen by others
        if condition.embedding_mask is not None:
            self.counts = condition.embedding_mask | ~condition.embedding_mask.any(dim=1, keepdim=True)
        places = len(self.turns[0])
        self.blocks = [ExactBlock(block, batch, places) for block in cast("list[Block]", prior.blocks)]
        self.gain = prior.norm.weight.double()
        self.output = Product.of(prior.output)
        self.place = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        x = self.before if previous is None else self.embedding[previous]
        here = slice(self.place, self.place + x.shape[1])
        cosine, sine = (part[here] for part in self.turns)
        hidden = self.hidden(here)
        for block in self.blocks:
            x = block(x, cosine, sine, hidden)
        self.place = here.stop
        return self.output(normalised(x[:, -1:]).mul_(self.gain))

    def hidden(self, here: slice) -> Tensor | None:
        """`b m n`, or `m n` for all samples: True where one of the places here does not see one of those up to them;
        None where each sees all. Padding is seen by none but itself."""
        if here.stop == 1 or (here.start and self.counts is None):
            return None
        places = torch.arange(here.stop, device=self.embedding.device)
        later = places > places[here, None]
        if self.counts is None:
            return later
        padding = F.pad(~self.counts, (0, here.stop - self.counts.shape[1]), value=False)
        return later | (padding[:, None] & (places != places[here, None]))


class ExactBlock:
    """A block, with the keys and values of the places so far."""

    def __init__(self, block: Block, batch: int, places: int):
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.width = attention.out.in_features // self.heads
        self.gains = block.attention_norm.weight.double(), block.feed_forward_norm.weight.double()
        self.qkv, self.out = Product.of(attention.qkv), Product.of(attention.out)
        self.gate_up, self.down = Product.of(feed_forward.gate_up), Product.of(feed_forward.down)
        self.attention = exact.Attention(batch * self.heads, places, self.width, attention.out.weight.device)

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor, hidden: Tensor | None) -> Tensor:
        """x: b m d, at the next m places; cosine, sine: m d/2, of their turns; hidden: see `ExactLlamaGen`."""
        qkv = self.qkv(normalised(x).mul_(self.gains[0])).unflatten(-1, (3, self.heads, self.width))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # b heads m d
        queries, keys = (turned(part, cosine, sine).flatten(0, 1) for part in (queries, keys))
        self.attention.add(keys, values.flatten(0, 1))
        if hidden is not None and hidden.dim() == 3:
            hidden = hidden.repeat_interleave(self.heads, dim=0)
        attended = self.attention(queries.mul_(1 / math.sqrt(self.width)), hidden)
        x = x + self.out(attended.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(normalised(x).mul_(self.gains[1])).chunk(2, dim=-1)
        return x + self.down(exact.silu(gate).mul_(up))


def normalised(x: Tensor) -> Tensor:
    """RMSNorm of the last axis without its gain; its epsilon stands inside the root."""
    return x / exact.square_root(exact.mean_square(x).add_(EPSILON))


def place_turns(grid: Grid, before: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `llamagen.place_turns`, `before + n - 1` x `head_width / 2`: no place follows the last
    code. Both are 0 for the places before the codes."""
    pairs = head_width // 4
    frequencies = [exact.power(ROPE_BASE, -pair / pairs) for pair in range(pairs)]
    rows, columns = ([[n * f for f in frequencies] for n in range(count)] for count in (grid.height, grid.width))
    turns = exact.cosine_and_sine([row + column for row in rows for column in columns], device)
    cosine, sine = (F.pad(part[:-1], (0, 0, before, 0)) for part in turns)
    return cosine, sine


def prefix(prior: LlamaGen, batch: int, condition: Condition) -> Tensor:
    """What comes before the codes, `b p d`."""
    if prior.caption is not None:
        assert condition.embeddings is not None
        assert condition.embedding_mask is not None
        return caption(prior.caption, condition.embeddings, condition.embedding_mask)
    assert prior.classes is not None
    classes = prior.classes.weight.double()
    return classes[-1].expand(batch, 1, -1) if condition.labels is None else classes[condition.labels][:, None]


def caption(module: CaptionEmbedding, vectors: Tensor, mask: Tensor) -> Tensor:
    """What `module` makes of vectors, `b t d_in`, of which those of the mask count, `b t`: `b t d`."""
    vectors = vectors.double().masked_fill(~mask[..., None], 0)
    known = (vectors != 0).any(dim=(1, 2), keepdim=True)
    hidden = Product.of(module.hidden)(torch.where(known, vectors, module.null.double()))
    return Product.of(module.out)(exact.gelu_by_tanh(hidden))
