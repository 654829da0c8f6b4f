"""LlamaGen's transformer (Sun et al. 2024, arXiv:2406.06525): Llama's blocks over codes in raster order.

RMSNorm before each sublayer, SwiGLU, and rotary positions of rows and columns. What comes before the codes is a class,
or the vectors of a caption, which a text encoder made (the published models: 120 of Flan-T5-XL, padded at the left):

    input      class   code 0   ...   code n-2          text 0   ...   text t-1   code 0   ...   code n-2
    logits of  code 0  code 1   ...   code n-1                         code 0     code 1   ...   code n-1

The places of the class and of the text have no position. Their queries and keys are multiplied by zero, as in the
published code: all scores with them are 0, and they speak by their values alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.column_blocks import ColumnBlocks, join
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig:
    kind: Literal["llamagen"] = "llamagen"
    layers: int = 12
    width: int = 768  # d
    heads: int = 12  # each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    hidden_width: int | None = None  # of SwiGLU; None: 8/3 of the width, rounded up to a multiple of 256
    dropout: float = 0.0  # of the embedded sequence
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.width % (4 * self.heads):
            raise UserError(
                f"width={self.width} with heads={self.heads}, expected a width that is a multiple of "
                f"{4 * self.heads}: each head turns pairs of numbers by the row and pairs by the column"
            )
        if self.hidden_width is not None and self.hidden_width < 1:
            raise UserError(f"hidden_width={self.hidden_width}, expected at least 1; leave it out for 8/3 of the width")
        for name in ("dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected a share from 0 to below 1")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        return self.hidden_width or math.ceil(8 * self.width // 3 / 256) * 256


EPSILON = 1e-5  # of every RMSNorm, inside the root
ROPE_BASE = 10000.0  # turns of 1 to nearly 1/10000 radian


def place_turns(grid: Grid, before: int, head_width: int, device: torch.device) -> Tensor:
    """Complex numbers by which each place multiplies the pairs of a head, `before + n` x `head_width / 2`: turns of the
    first half of the pairs by the code's row, of the second by its column; 0 for the places before the codes."""
    pairs = head_width // 4
    frequencies = ROPE_BASE ** (-torch.arange(pairs, device=device) / pairs)
    rows, columns = (torch.arange(count, device=device)[:, None] * frequencies for count in (grid.height, grid.width))
    angles = torch.cat([rows.repeat_interleave(grid.width, 0), columns.repeat(grid.height, 1)], dim=1)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turns.new_zeros(before, 2 * pairs), turns])


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """`x` (b heads n d), each pair of neighbours along d multiplied as a complex number by `turns` (n d/2)."""
    first, second = rearrange(x, "b heads n (d pair) -> pair b heads n d", pair=2)
    cos, sin = turns.real.to(x.dtype), turns.imag.to(x.dtype)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rearrange(turned, "b heads n d pair -> b heads n (d pair)")


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        """mask: b n n, True where the row's place sees the column's; None for the plain causal one."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        q, k = turn(q, turns), turn(k, turns)
        seen = None if mask is None else mask[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, seen, is_causal=mask is None)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    """SwiGLU: one half of the hidden vector opens and closes the other."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, EPSILON)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, EPSILON)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), turns, mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class CaptionEmbedding(nn.Module):
    """Vectors of a text encoder -> `b t d`. A sample of which no vector counts gets fixed random vectors instead: any
    text."""

    null: Tensor

    def __init__(self, length: int, width_in: int, width: int):
        super().__init__()
        self.register_buffer("null", torch.randn(length, width_in) / math.sqrt(width_in))  # t d_in, never trained
        self.hidden = nn.Linear(width_in, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """vectors: b t d_in; mask: b t, True for a vector that counts."""
        known = ((vectors != 0) & mask[..., None]).any(dim=(1, 2))  # b
        vectors = torch.where(known[:, None, None], vectors * mask[..., None], self.null)
        return self.out(F.gelu(self.hidden(vectors.to(self.out.weight.dtype)), approximate="tanh"))


class LlamaGen(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid, or when it is to be given tokens of a text, or
    classes and a text."""

    kind = "llamagen"
    config_class = LlamaGenConfig
    config: LlamaGenConfig
    reads_text = True  # by its embeddings
    padded_left = True  # as in the published models
    reads_given = False

    def __init__(self, config: LlamaGenConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid = self.only_grid()
        if self.text or (self.embeddings and num_classes):
            raise UserError(
                "a llamagen prior goes by classes or by embeddings of captions, expected one of these; take a "
                "transformer prior for tokens of a text"
            )
        self.prefix_length = 1 if self.embeddings is None else self.embeddings.length
        self.classes: nn.Embedding | None = None
        self.caption: CaptionEmbedding | None = None
        if self.embeddings is None:
            self.classes = nn.Embedding(num_classes + 1, config.width)  # the last one is the null label
        else:
            self.caption = CaptionEmbedding(self.embeddings.length, self.embeddings.width, config.width)
        self.embedding = nn.Embedding(self.grid.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, EPSILON)
        self.output = nn.Linear(config.width, self.grid.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forget(self, condition: Condition, which: Tensor) -> Condition:
        """See `Prior`. A caption that is left out keeps its length, as in the published models' training."""
        if condition.embeddings is None:
            return super().forget(condition, which)
        return replace(condition, embeddings=condition.embeddings.masked_fill(which[:, None, None], 0))

    def prefix(self, batch: int, condition: Condition) -> Tensor:
        """What comes before the codes, `b p d`."""
        if self.caption is not None:
            assert condition.embeddings is not None
            assert condition.embedding_mask is not None
            return self.caption(condition.embeddings, condition.embedding_mask)
        assert self.classes is not None
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, 1, -1)
        return self.classes(condition.labels)[:, None]

    def mask(self, condition: Condition, places: int) -> Tensor | None:
        """`b n n`, True where the row's place sees the column's; None where that is the plain causal mask. The padding
        of a text is seen by none but itself; all of it where nothing counts."""
        if condition.embedding_mask is None:
            return None
        counts = condition.embedding_mask | ~condition.embedding_mask.any(dim=1, keepdim=True)  # b t
        seen = F.pad(counts, (0, places - counts.shape[1]), value=True)[:, None]  # b 1 n
        causal = torch.ones(places, places, dtype=torch.bool, device=seen.device).tril_()
        return causal & (seen | torch.eye(places, dtype=torch.bool, device=seen.device))

    def turns(self) -> Tensor:
        """See `place_turns`. No buffer: a model in bfloat16 would round them."""
        return place_turns(self.grid, self.prefix_length, self.config.head_width, self.embedding.weight.device)[:-1]

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        tokens = self.sequence(codes, condition)
        x = torch.cat([self.prefix(len(tokens), condition), self.embedding(tokens[:, :-1])], dim=1)  # b p+n-1 d
        x, turns, mask = self.dropout(x), self.turns(), self.mask(condition, x.shape[1])
        for block in self.blocks:
            x = block(x, turns, mask)
        return self.output(self.norm(x[:, self.prefix_length - 1 :]))

    def stepper(self, batch: int, condition: Condition) -> LlamaGenStepper:
        return LlamaGenStepper(self, batch, condition)


class StepBlock:
    """A block's weights, and the keys and values of the places so far. The gain of each norm is folded into the matrix
    behind it, and the scale of the attention scores into the queries."""

    def __init__(self, block: Block, heads: int, cache: Tensor, dtype: torch.dtype):
        """cache: two (heads b) n d, empty."""
        # Folded in float32, so that weights in bfloat16 are rounded once.
        qkv, gate_up = block.attention.qkv.weight.float(), block.feed_forward.gate_up.weight.float()
        width, hidden = qkv.shape[1], len(gate_up) // 2
        self.heads = heads
        scale = torch.ones(len(qkv), 1, device=qkv.device)
        scale[:width] /= math.sqrt(width // heads)
        self.qkv = ColumnBlocks(qkv * scale * block.attention_norm.weight, 3 * heads, dtype)
        self.out = ColumnBlocks(block.attention.out.weight, math.gcd(8, width), dtype)
        self.gate_up = ColumnBlocks(gate_up * block.feed_forward_norm.weight, 2 * math.gcd(32, hidden), dtype)
        self.down = ColumnBlocks(block.feed_forward.down.weight, math.gcd(8, width), dtype)
        self.cache = cache

    def advance(self, x: Tensor, first: int, places: int, turns: Tensor, mask: Tensor | None) -> None:
        """x, `(b n) d`, of the places from `first` on, goes through the block in place. turns: of these places, n d/2.
        mask: b n first+n, added to the scores."""
        here = slice(first, first + places)
        rows = self.qkv(normalised(x))  # 3heads (b n) d
        query_key, value = rows.view(3, -1, places, rows.shape[-1]).split([2, 1])  # three (heads b) n d
        turned = torch.view_as_complex(query_key.float().unflatten(-1, (-1, 2))) * turns
        query, key = torch.view_as_real(turned).flatten(-2).to(rows.dtype)
        self.cache[0, :, here], self.cache[1, :, here] = key, value[0]
        keys, values = self.cache[:, :, : here.stop].unbind()
        scores = torch.bmm(query, keys.mT)
        if mask is not None:
            scores.unflatten(0, (self.heads, -1)).add_(mask)
        attended = torch.bmm(scores.softmax(dim=-1), values)  # (heads b) n d
        add_to(x, self.out(join(attended.view(self.heads, len(x), -1))))
        gate, up = self.gate_up(normalised(x)).chunk(2)
        add_to(x, self.down(join(F.silu(gate).mul_(up))))


def normalised(x: Tensor) -> Tensor:
    """RMSNorm of the last axis without its gain."""
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON)


def add_to(x: Tensor, product: Tensor) -> None:
    """Adds `blocks b d` to x, `b (blocks d)`, in place."""
    x.unflatten(1, (len(product), -1)).add_(product.transpose(0, 1))


class LlamaGenStepper:
    """One code per call: keys and values of earlier places wait in a cache that is allocated once. What comes before
    the codes goes through at the first call, all at once."""

    @torch.inference_mode()
    def __init__(self, prior: LlamaGen, batch: int, condition: Condition):
        prior.check(batch, condition)
        config, device = prior.config, prior.embedding.weight.device
        condition = condition.to(device)
        dtype = step_dtype(prior.embedding.weight)
        self.embedding = prior.embedding.weight.to(dtype)
        self.prefix = prior.prefix(batch, condition).to(dtype)  # b p d
        self.turns = prior.turns()
        sizes = (config.layers, 2, config.heads * batch, len(self.turns), config.head_width)
        cache = torch.empty(sizes, dtype=dtype, device=device)
        blocks = cast("list[Block]", prior.blocks)
        self.blocks = [StepBlock(block, config.heads, part, dtype) for block, part in zip(blocks, cache, strict=True)]
        self.mask: Tensor | None = None  # b n n, 0 where the row's place sees the column's, else -inf
        if (seen := prior.mask(condition, len(self.turns))) is not None:
            self.mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)
        output = prior.output.weight.float() * prior.norm.weight
        self.output = ColumnBlocks(output, math.gcd(8, len(output)), dtype)
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self._next(self.prefix if previous is None else F.embedding(previous, self.embedding))[:, None]

    def _next(self, x: Tensor) -> Tensor:
        """x: b n d, at the places from `position` on; logits `b k` after the last of them."""
        here = slice(self.position, self.position + x.shape[1])
        mask = None if self.mask is None else self.mask[:, here, : here.stop]
        rows, turns = x.flatten(0, 1).clone(), self.turns[here]
        for block in self.blocks:
            block.advance(rows, here.start, x.shape[1], turns, mask)
        self.position = here.stop
        return join(self.output(normalised(rows.view_as(x)[:, -1]))).float()
