"""Decoder-only transformer over codes in raster order, as in VQ-GAN (Esser et al. 2021, arXiv:2012.09841).

The blocks are those of today's language models: RMSNorm before each sublayer (Zhang & Sennrich 2019, arXiv:1910.07467),
SwiGLU (Shazeer 2020, arXiv:2002.05202) and rotary positions (Su et al. 2021, arXiv:2104.09864) of rows and columns.

    input      class   code 0   code 1   ...   code n-2
    logits of  code 0  code 1   code 2   ...   code n-1

A caption, and given codes of other grids (a segmentation map, depth, a lower resolution), stand between the class and
the codes: see `Prefix`. Attention is causal over all of them: it needs no mask, and a caption can be learned too.

Codes of several grids (levels, depths, scales) follow each other in one sequence, coarse to fine. Each grid has its own
embedding and output, and a place of a coarse grid stands at the middle of what it covers of the finest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.decoding.column_blocks import in_blocks
from stage2_prior.decoding.engine import BlockWeights, Decoder, Product, Weights, layout, turn_table
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import NO_CODE, AutoregressivePrior, TrainingLoss
from stage2_prior.priors.prefix import Prefix
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    kind: Literal["transformer"] = "transformer"
    layers: int = 8
    width: int = 256  # d
    heads: int = 8  # each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    key_value_heads: int | None = None  # each shared by heads / key_value_heads heads; None: every head has its own
    dropout: float = 0.0  # of the embedded sequence
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream
    tied: bool = False  # the output shares the weights of the code embedding
    text_loss_weight: float = 0.0  # share of the loss that is the caption's, the rest is the codes'; DALL-E: 0.125

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.width % (4 * self.heads):
            raise UserError(
                f"width={self.width} with heads={self.heads}, expected a width that is a multiple of "
                f"{4 * self.heads}: each head turns pairs of numbers by the row and pairs by the column"
            )
        if self.heads % self.shared_heads or self.shared_heads < 1:
            raise UserError(
                f"key_value_heads={self.key_value_heads} with heads={self.heads}, expected a number that divides them: "
                "so many heads share each"
            )
        for name in ("dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected a share from 0 to below 1")
        if not 0 <= self.text_loss_weight < 1:
            raise UserError(f"text_loss_weight={self.text_loss_weight}, expected a share from 0 to below 1")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def shared_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def hidden_width(self) -> int:
        """SwiGLU has three matrices where a plain feed-forward of 4d has two: 8/3 d costs the same."""
        return math.ceil(8 * self.width / 3 / 32) * 32


class RMSNorm(nn.Module):
    """x / (rms(x) + epsilon) * gain over the last axis, the root mean square in float32."""

    epsilon = 1e-6

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) / math.sqrt(x.shape[-1])
        return (x / (rms + self.epsilon)).to(x.dtype) * self.gain


def place_angles(grids: Sequence[Grid], head_width: int, device: torch.device | None = None) -> Tensor:
    """Angles in radians, `n+1` x `head_width / 2`, by which each place turns the pairs of a head: the first half of
    the pairs by its row, the second by its column. Place 0 is the class token's and is not turned; place 1 + i is
    that of code i, in the rasters of `grids`, one after the other. Rows and columns are those of the largest grid."""
    pairs = head_width // 4
    # A grid has tens of rows: turns of 1 to 1/100 radian.
    frequencies = 100.0 ** (-torch.arange(pairs, device=device) / pairs)
    height, width = max(grid.height for grid in grids), max(grid.width for grid in grids)
    angles = [torch.zeros(1, 2 * pairs, device=device)]
    for grid in grids:
        rows, columns = (
            (torch.arange(count, device=device) + 0.5) * (largest / count) - 0.5
            for count, largest in ((grid.height, height), (grid.width, width))
        )
        by_row = rows.repeat_interleave(grid.width)[:, None] * frequencies
        by_column = columns.repeat(grid.height)[:, None] * frequencies
        angles.append(torch.cat([by_row, by_column], dim=-1))  # h*w head_width/2
    return torch.cat(angles)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """`x` (b heads n d) with each pair of neighbours along d turned by the angle (n d/2)."""
    first, second = rearrange(x, "b heads n (d pair) -> pair b heads n d", pair=2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rearrange(turned, "b heads n d pair -> b heads n (d pair)")


class Attention(nn.Module):
    """Causal self-attention. A query stands at the code to be predicted, a key at the code that its token holds: the
    code above is one row up for every query, and the token of the class is the fixed point of the grid.

    Groups of heads may share keys and values (Ainslie et al. 2023, arXiv:2305.13245): sampling, which mostly reads them
    again at every step, has as many times less to read.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.split = [config.heads, config.shared_heads, config.shared_heads]
        self.qkv = nn.Linear(config.width, sum(self.split) * config.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return self.attend(*self.turned(x, angles))

    def turned(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, `b heads n d`, keys and values, `b shared_heads n d`."""
        q, k, v = rearrange(self.qkv(x), "b n (heads d) -> b heads n d", heads=sum(self.split)).split(self.split, dim=1)
        return turn(q, angles[1:]), turn(k, angles[:-1]), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] < q.shape[1]:
            k, v = (shared.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for shared in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    """SwiGLU: one half of the hidden vector opens and closes the other."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden_width, bias=False)
        self.down = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), angles))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(AutoregressivePrior):
    """Codes of any number of grids, after a class, a caption and given codes."""

    kind = "transformer"
    reads_text = True
    takes_windows = True
    config_class = TransformerConfig
    config: TransformerConfig

    def __init__(self, config: TransformerConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        grids = code_spec.grids
        self.vocabularies = [grid.vocabulary for grid in grids]
        self.sizes = [grid.size for grid in grids]
        self.classes = nn.Embedding(num_classes + 1, config.width)  # the last one is the null label
        self.prefix = Prefix(config.width, self.text, self.embeddings, self.given)
        self.embedding = nn.Embedding(sum(self.vocabularies), config.width)  # grid after grid
        # Of the grid that the next code belongs to; added to the token before it.
        self.next_grid = nn.Embedding(len(grids), config.width) if len(grids) > 1 else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, sum(self.vocabularies), bias=False)
        if config.text_loss_weight:
            if self.text is None:
                raise UserError(
                    f"text_loss_weight={config.text_loss_weight}, expected 0 for a prior that reads no captions; leave "
                    "it out, or give captions"
                )
            self.text_output = nn.Linear(config.width, self.text.vocabulary, bias=False)
        self.initialise()
        if config.tied:
            self.output.weight = self.embedding.weight

    def initialise(self) -> None:
        """As GPT-2: normal of 0.02, and less for what adds to the residual stream, so that its variance does not
        grow with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if adds else 0.02)

    def angles(self) -> Tensor:
        """See `place_angles`; a caption has no place in the image and is not turned, like the class. No buffer: a model
        in bfloat16 would round its angles."""
        grids = (*self.given, *self.code_spec.grids)
        angles = place_angles(grids, self.config.head_width, self.embedding.weight.device)
        return F.pad(angles, (0, 0, self.prefix.text_length + self.prefix.embeddings_length, 0))

    def per_code(self, per_grid: Sequence[int]) -> Tensor:
        """A number of each grid for each of its codes: `n`."""
        device = self.embedding.weight.device
        return torch.tensor(per_grid, device=device).repeat_interleave(torch.tensor(self.sizes, device=device))

    def first_numbers(self) -> list[int]:
        """Where the embeddings of each grid begin."""
        return [sum(self.vocabularies[:number]) for number in range(len(self.vocabularies))]

    def class_token(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, the start of the sequence."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def start(self, batch: int, condition: Condition) -> Tensor:
        """What is known before the first code: the class and the prefix, `b 1+p d`."""
        token = self.class_token(batch, condition)[:, None]
        return torch.cat([token, self.prefix(condition)], dim=1) if self.prefix.length else token

    def states(self, codes: Codes, condition: Condition) -> Tensor:
        """`b p+n d`: the last n tell the codes, the p before them the prefix."""
        tokens = self.sequence(codes, condition)
        start = self.start(len(tokens), condition)
        if self.next_grid is not None:
            tokens = tokens + self.per_code(self.first_numbers())
        x = torch.cat([start, self.embedding(tokens[:, :-1])], dim=1)
        if self.next_grid is not None:
            x = x + F.pad(self.next_grid(self.per_code(range(len(self.sizes)))), (0, 0, self.prefix.length, 0))
        x, angles = self.dropout(x), self.angles()
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        return self.code_logits(self.states(codes, condition)[:, self.prefix.length :])

    def code_logits(self, states: Tensor) -> Tensor:
        """`b n d` -> `b n k`."""
        if self.next_grid is None:
            return self.output(states)
        outputs = zip(states.split(self.sizes, 1), self.output.weight.split(self.vocabularies), strict=True)
        logits = [F.linear(part, weight) for part, weight in outputs]
        largest = max(self.vocabularies)
        return torch.cat([F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE) for part in logits], dim=1)

    def forward(self, codes: Codes, condition: Condition) -> TrainingLoss:
        if not self.config.text_loss_weight:
            return super().forward(codes, condition)
        states = self.states(codes, condition)
        logits = rearrange(self.code_logits(states[:, self.prefix.length :]).float(), "b n k -> b k n")
        nll = F.cross_entropy(logits, self.sequence(codes, condition), reduction="none").mean(dim=1)
        weight = self.config.text_loss_weight
        return TrainingLoss((1 - weight) * nll + weight * self.text_nll(states, condition), nll.detach())

    def text_nll(self, states: Tensor, condition: Condition) -> Tensor:
        """Nats per token of each caption, `b`; 0 where there is none."""
        assert condition.text is not None
        told = condition.text >= 0  # b t
        logits = rearrange(self.text_output(states[:, : told.shape[1]]).float(), "b t k -> b k t")
        nll = F.cross_entropy(logits, condition.text.clamp(min=0), reduction="none")
        return (nll * told).sum(dim=1) / told.sum(dim=1).clamp(min=1)

    def stepper(self, batch: int, condition: Condition) -> TransformerStepper:
        return TransformerStepper(self, batch, condition)


class StackWeights:
    """The blocks of a stack as its decoder wants them, and the matrices behind its last norm. The gain of each norm and
    sqrt(d) of its root mean square are folded into the matrix behind it, and the scale of the attention scores into the
    queries, so that what is left of a norm is one division."""

    def __init__(
        self,
        config: TransformerConfig,
        blocks: Iterable[nn.Module],
        gain: Tensor,
        outputs: Sequence[Tensor],
        angles: Tensor,
        dtype: torch.dtype,
        parts: int,
    ):
        """gain: of the last norm; outputs: k d, each; angles: `places+1 d/2`, see `place_angles`; parts: in which
        matrices lie, see `layout`."""
        self.root = math.sqrt(config.width)
        turns = torch.polar(torch.ones_like(angles), angles)
        self.weights = Weights(
            blocks=[self.block(block, config, dtype, parts) for block in cast("Iterable[Block]", blocks)],
            width=config.width,
            heads=config.heads,
            shared=config.shared_heads,
            normalise=self.divided,
            gated=True,
            turns=turn_table(turns[1:], turns[:-1], config.heads, config.shared_heads),
        )
        self.outputs = [
            Product(output.float() * gain * self.root, None, math.gcd(parts, len(output)), dtype) for output in outputs
        ]

    def block(self, block: Block, config: TransformerConfig, dtype: torch.dtype, parts: int) -> BlockWeights:
        # Folded in float32, so that weights in bfloat16 are rounded once.
        qkv = block.attention.qkv.weight.float() * block.attention_norm.gain * self.root
        qkv[: config.width] /= math.sqrt(config.head_width)
        gate_up = block.feed_forward.gate_up.weight.float() * block.feed_forward_norm.gain * self.root
        down, out = block.feed_forward.down.weight, block.attention.out.weight
        return BlockWeights(
            qkv=Product(qkv, None, 1 if parts == 1 else sum(block.attention.split), dtype),
            out=Product(out, None, math.gcd(parts, config.width), dtype),
            up=Product(gate_up, None, 1 if parts == 1 else 2 * parts, dtype),
            down=Product(down, None, math.gcd(parts, config.width), dtype),
        )

    def divided(self, stream: Tensor, rows: Tensor) -> Tensor:
        """RMSNorm, but for what the weights hold of it."""
        if stream.dim() == 2:
            norm = torch.linalg.vector_norm(stream, dim=1, keepdim=True).add_(RMSNorm.epsilon * self.root)
            return torch.div(stream, norm, out=rows)
        norm = torch.linalg.vector_norm(stream, dim=(0, 2), keepdim=True).add_(RMSNorm.epsilon * self.root)
        torch.div(stream, norm, out=in_blocks(rows, len(stream)))
        return rows


class StepWeights(NamedTuple):
    """What sampling reads of a transformer, made once for each of its states."""

    stack: StackWeights
    embedding: Tensor  # k d, of all grids
    next_grid: Tensor | None
    grid_of: Tensor  # n, the grid that the code at each place belongs to
    first_number: Tensor  # n, where the embeddings of the grid begin that the code before each place belongs to

    @classmethod
    def of(cls, prior: Transformer, dtype: torch.dtype, parts: int) -> StepWeights:
        outputs = prior.output.weight.split(prior.vocabularies)
        stack = StackWeights(prior.config, prior.blocks, prior.norm.gain, outputs, prior.angles(), dtype, parts)
        device = prior.embedding.weight.device
        grids = range(len(prior.sizes))
        grid_of = torch.cat([torch.full((prior.sizes[grid],), grid, device=device) for grid in grids])
        firsts = zip(prior.sizes, prior.first_numbers(), strict=True)
        first_number = torch.cat([torch.full((size,), first, device=device) for size, first in firsts])
        return cls(
            stack,
            prior.embedding.weight.detach().to(dtype),
            None if prior.next_grid is None else prior.next_grid.weight.detach().to(dtype),
            grid_of,
            F.pad(first_number, (1, -1)),
        )


class TransformerStepper:
    """One place, or a window of places, of the transformer per call. Computes in autocast's type where autocast is on
    when it is made, else in the weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: Transformer, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, dtype = prior.embedding.weight.device, step_dtype(prior.embedding.weight)
        parts = layout(batch, device)
        weights = prepared(prior, (dtype, parts), lambda: StepWeights.of(prior, dtype, parts))
        self.stack, self.embedding, self.next_grid, self.grid_of, self.first_number = weights
        self.outputs = weights.stack.outputs
        self.grid_at = [grid for grid, size in enumerate(prior.sizes) for _ in range(size)]
        self.first_numbers = prior.first_numbers()
        start = prior.start(batch, condition.to(device)).to(dtype)  # b 1+p d
        self.start = start[:, -1]  # b d, the token before the first code
        self.before = prior.prefix.length
        self.position = 0
        self.decoder = Decoder(self.stack.weights, batch, self.before + len(self.grid_at), dtype, device)
        if self.before:
            self.decoder.read(start[:, :-1])

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            grid = self.grid_at[self.position]
            x = self.start if previous is None else self._embedded(previous[:, 0])
            if self.next_grid is not None:
                x = x + self.next_grid[grid]
            states = self.decoder.step(x, self.before + self.position)
            self.position += 1
            return self.outputs[grid].joined(states).float()[:, None]

    def _embedded(self, previous: Tensor) -> Tensor:
        if first := self.first_numbers[self.grid_at[self.position - 1]]:
            previous = previous + first
        return F.embedding(previous, self.embedding)

    @torch.inference_mode()
    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            places = first[:, None] + torch.arange(previous.shape[1], device=first.device)
            within = places.clamp(max=len(self.grid_of) - 1)
            x = F.embedding(previous.clamp(min=0) + self.first_number[within], self.embedding)
            x = torch.where((places == 0)[..., None], self.start[:, None], x)
            if self.next_grid is not None:
                x = x + self.next_grid[self.grid_of[within]]
            states = self.decoder.window(x, self.before + first).flatten(0, 1)
            logits = [output.joined(states).float().unflatten(0, places.shape) for output in self.outputs]
            largest = max(part.shape[-1] for part in logits)
            chosen = logits[0]
            for grid, part in enumerate(logits):
                filled = F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE)
                chosen = filled if grid == 0 else torch.where((self.grid_of[within] == grid)[..., None], filled, chosen)
            return chosen
