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
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.decoding.engine import (
    BlockWeights,
    Decoder,
    Product,
    Room,
    Weights,
    blocks_of,
    blocks_of_heads,
    norm_of,
    turn_table,
)
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import AutoregressivePrior
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

    @classmethod
    def sizes_of(cls, relative: Any) -> Self:
        """Of a config that names its sizes alike: RandAR's and others, made of the same layers."""
        return cls(**{size.name: getattr(relative, size.name) for size in fields(cls) if size.name != "kind"})

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

    def step(self, x: Tensor, turns: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """As `forward` at one place, b 1 d, for priors that take no windows of them. turns: of the place, 1 d_head/2;
        keys, values: b heads n d, of all places, where those of this one are written."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        keys[:, :, place : place + 1], values[:, :, place : place + 1] = turn(k, turns), v
        known = slice(place + 1)
        attended = F.scaled_dot_product_attention(turn(q, turns), keys[:, :, known], values[:, :, known])
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

    def step(self, x: Tensor, turns: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """See `Attention.step`."""
        x = x + self.attention.step(self.attention_norm(x), turns, keys, values, place)
        return x + self.feed_forward(self.feed_forward_norm(x))


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
    takes_windows = True
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

    @property
    def numbers_kept(self) -> int:
        return 2 * self.config.layers * (self.prefix_length + self.grid.size) * self.config.width

    def stepper(self, batch: int, condition: Condition) -> LlamaGenStepper:
        return LlamaGenStepper(self, batch, condition)


class Stack(Protocol):
    """What a prior of these blocks is made of, besides what begins its sequence."""

    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.RMSNorm
    output: nn.Linear

    def turns(self) -> Tensor: ...


class StepWeights:
    """What sampling reads of a LlamaGen, made once for each of its states. The gain of each norm and sqrt(d) of its
    root mean square are folded into the matrix behind it, and the scale of the attention scores into the queries."""

    def __init__(self, prior: Stack, config: LlamaGenConfig, dtype: torch.dtype):
        turns = prior.turns()
        self.root = math.sqrt(config.width)
        self.epsilon = turns.real.new_full((), math.sqrt(EPSILON) * self.root)
        self.embedding = prior.embedding.weight.detach().to(dtype)
        self.weights = Weights(
            blocks=[self.block(block, config, dtype) for block in cast("Iterable[Block]", prior.blocks)],
            width=config.width,
            heads=config.heads,
            shared=config.heads,
            normalise=self.divided,
            gated=True,
            turns=turn_table(turns, turns, config.heads, config.heads),
        )
        output = prior.output.weight.float() * prior.norm.weight * self.root
        self.output = Product(output, None, dtype)

    def block(self, block: Block, config: LlamaGenConfig, dtype: torch.dtype) -> BlockWeights:
        # Folded in float32, so that weights in bfloat16 are rounded once.
        qkv = block.attention.qkv.weight.float() * block.attention_norm.weight * self.root
        qkv[: config.width] /= math.sqrt(config.head_width)
        gate_up = block.feed_forward.gate_up.weight.float() * block.feed_forward_norm.weight * self.root
        return BlockWeights(
            qkv=Product(qkv, None, dtype, blocks_of_heads(3 * config.heads, config.head_width, dtype)),
            out=Product(block.attention.out.weight, None, dtype),
            up=Product(gate_up, None, dtype, 2 * blocks_of(config.hidden, dtype)),
            down=Product(block.feed_forward.down.weight, None, dtype),
        )

    def divided(self, room: Room) -> None:
        """RMSNorm, but for what the weights hold of it."""
        torch.div(room.stream, norm_of(room.stream).hypot_(self.epsilon), out=room.rows_like_stream)


class LlamaGenStepper:
    """One place, or a window of places, per call. What comes before the codes goes through beforehand, all at once, and
    its last place again with the first code: it is the start from which that is predicted."""

    @torch.inference_mode()
    def __init__(self, prior: LlamaGen, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, dtype = prior.embedding.weight.device, step_dtype(prior.embedding.weight)
        condition = condition.to(device)
        weights = prepared(prior, dtype, lambda: StepWeights(prior, prior.config, dtype), rows=batch)
        self.embedding, self.output = weights.embedding, weights.output
        prefix = prior.prefix(batch, condition).to(dtype)  # b p d
        self.start = prefix[:, -1]
        self.before = prior.prefix_length - 1
        places = self.before + prior.grid.size
        self.decoder = Decoder(weights.weights, batch, places, dtype, device)
        self.position = 0
        self.hidden: Tensor | None = None  # b n, padding of a text, which is seen by none but itself
        seen = prior.mask(condition, prior.prefix_length)
        if condition.embedding_mask is not None:
            counts = condition.embedding_mask | ~condition.embedding_mask.any(dim=1, keepdim=True)
            self.hidden = F.pad(~counts, (0, places - counts.shape[1]), value=False)
        if self.before:
            with torch.autocast(device.type, enabled=False):
                self.decoder.read(prefix, None if seen is None else ~seen)

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            x = self.start if previous is None else F.embedding(previous[:, 0], self.embedding)
            place, hidden = self.before + self.position, None
            if self.hidden is not None:
                hidden = self.hidden[:, : place + 1]
                if previous is None:  # padding sees itself
                    hidden = F.pad(hidden[:, :-1], (0, 1), value=False)
            self.position += 1
            return self.output.joined(self.decoder.step(x, place, hidden)).float()[:, None]

    @torch.inference_mode()
    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            places = first[:, None] + torch.arange(previous.shape[1], device=first.device)
            x = F.embedding(previous.clamp(min=0), self.embedding)
            x = torch.where((places == 0)[..., None], self.start[:, None], x)
            states = self.decoder.window(x, self.before + first, self.hidden).flatten(0, 1)
            return self.output.joined(states).float().unflatten(0, places.shape)
