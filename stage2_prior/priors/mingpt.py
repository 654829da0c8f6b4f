"""The GPT of VQ-GAN (Esser et al. 2021, arXiv:2012.09841), which is minGPT: GPT-2's blocks over codes in raster order.

Learned positions, LayerNorm before each sublayer, exact GELU, biases everywhere. All that it reads are numbers of one
shared vocabulary: what comes before the codes is a class, the codes of a condition (a depth map, a segmentation, a
smaller image), or a fixed start token, and class 7, code 7 and given code 7 have the same embedding.

    input      class   code 0   code 1   ...   code n-2          given 0   ...   given p-1   code 0   ...   code n-2
    logits of  code 0  code 1   code 2   ...   code n-1                          code 0      code 1   ...   code n-1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.decoding.column_blocks import join
from stage2_prior.decoding.engine import BlockWeights, Decoder, Product, Room, Weights, blocks_of_heads
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import AutoregressivePrior, Places
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class MinGPTConfig:
    kind: Literal["mingpt"] = "mingpt"
    layers: int = 24
    width: int = 1024  # d
    heads: int = 16
    vocabulary: int | None = None  # numbers that have an embedding; None: just those of codes, classes and given codes
    positions: int | None = None  # places that have an embedding; None: just those of the sequence
    unmasked: int = 0  # first places, of what comes before the codes, that see each other in both directions
    start: int = 0  # the number that a sequence begins with where there are neither classes nor given codes
    order: tuple[int, ...] = ()  # the raster places of the codes in the order of the sequence; empty: raster order
    dropout: float = 0.0  # of the embedded sequence
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream
    attention_dropout: float = 0.0  # of the shares of attention

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))  # JSON has made a list of it
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in ("unmasked", "start"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}, expected 0 or more")
        if self.width % self.heads:
            raise UserError(f"width={self.width} with heads={self.heads}, expected a width that the heads divide")
        for name in ("dropout", "residual_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected a share from 0 to below 1")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Attention(nn.Module):
    def __init__(self, config: MinGPTConfig):
        super().__init__()
        self.heads = config.heads
        self.share_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """mask: n n, True where the row's place sees the column's; None for the plain causal one."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        dropout = self.share_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    def __init__(self, config: MinGPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.dropout(self.down(F.gelu(self.up(self.feed_forward_norm(x)))))


class MinGPT(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid, or when the config has fewer numbers or places than the
    codes and what comes before them."""

    kind = "mingpt"
    takes_windows = True
    config_class = MinGPTConfig
    config: MinGPTConfig

    def __init__(self, config: MinGPTConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid = self.only_grid()
        starts = bool(num_classes) or not self.given  # whether a class or the start token comes first
        self.prefix_length = int(starts) + sum(grid.size for grid in self.given)
        vocabularies = [self.grid.vocabulary, *(grid.vocabulary for grid in self.given)]
        if starts:
            vocabularies.append(num_classes + 1 if num_classes else config.start + 1)  # with the null label
        numbers, places = max(vocabularies), self.prefix_length + self.grid.size - 1
        vocabulary, positions = config.vocabulary or numbers, config.positions or places
        for name, have, need in (("vocabulary", vocabulary, numbers), ("positions", positions, places)):
            if have < need:
                raise UserError(
                    f"{name}={have}, expected at least {need} for {code_spec.describe()} and what comes before them; "
                    "leave it out to have as many as it takes"
                )
        if config.unmasked > self.prefix_length:
            raise UserError(
                f"unmasked={config.unmasked}, expected at most {self.prefix_length}, the places before the codes: a "
                "code must not see those after it"
            )
        if config.order and sorted(config.order) != list(range(self.grid.size)):
            raise UserError(
                f"order has {len(config.order)} places, expected each of 0 to {self.grid.size - 1} once, as "
                f"{code_spec.describe()} have; leave it out for raster order"
            )
        order = torch.tensor(config.order or range(self.grid.size))
        self.order: Tensor  # n, raster places in the order of the sequence
        self.ranks: Tensor  # n, where in the sequence each raster place is
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("ranks", order.argsort(), persistent=False)
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Parameter(torch.zeros(positions, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def place_tables(self) -> dict[str, Places]:
        if self.config.order:  # a row is a step of the order there, and of another grid's
            return {}
        return {"positions": Places(self.prefix_length, ((self.grid.height, self.grid.width),))}

    def prefix(self, batch: int, condition: Condition) -> Tensor:
        """What comes before the codes, int64 `b p`."""
        parts = [rearrange(grid, "b h w -> b (h w)") for grid in condition.codes or ()]
        if condition.labels is not None:
            parts.insert(0, condition.labels[:, None])
        elif not self.given:
            parts.insert(0, torch.full((batch, 1), self.config.start, device=self.positions.device))
        return torch.cat(parts, dim=1)

    def mask(self, places: int) -> Tensor | None:
        """`n n`, True where the row's place sees the column's; None where that is the plain causal mask."""
        if self.config.unmasked < 2:
            return None
        mask = torch.ones(places, places, dtype=torch.bool, device=self.positions.device).tril_()
        mask[: self.config.unmasked, : self.config.unmasked] = True
        return mask

    def hidden(self, embedded: Tensor) -> Tensor:
        """Embedded numbers, or any other vectors, at places 0 to n-1, to what `output` turns into logits: `b n d`."""
        x = self.dropout(embedded + self.positions[: embedded.shape[1]])
        mask = self.mask(x.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def sequence(self, codes: Codes, condition: Condition) -> Tensor:
        return super().sequence(codes, condition)[:, self.order]

    def grids_of(self, sequence: Tensor) -> tuple[Tensor, ...]:
        return super().grids_of(sequence[:, self.ranks])

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        tokens = self.sequence(codes, condition)
        x = torch.cat([self.prefix(len(tokens), condition), tokens[:, :-1]], dim=1)
        hidden = self.hidden(self.embedding(x))[:, self.prefix_length - 1 :]
        return F.linear(hidden, self.output.weight[: self.grid.vocabulary])  # other numbers are no codes

    @property
    def numbers_kept(self) -> int:
        return 2 * self.config.layers * (self.prefix_length + self.grid.size) * self.config.width

    def stepper(self, batch: int, condition: Condition) -> MinGPTStepper:
        return MinGPTStepper(self, batch, condition)


class StepWeights:
    """What sampling reads of a minGPT, made once for each of its states. Gain and bias of each norm are folded into the
    linear layer behind it, and the scale of the attention scores into the queries."""

    def __init__(self, prior: MinGPT, dtype: torch.dtype):
        config = prior.config
        self.embedding, self.positions = prior.embedding.weight.detach().to(dtype), prior.positions.detach().to(dtype)
        self.weights = Weights(
            blocks=[block_weights(block, dtype) for block in cast("list[Block]", prior.blocks)],
            width=config.width,
            heads=config.heads,
            shared=config.heads,
            normalise=normalised,
            gated=False,
            turns=None,
        )
        output = prior.output.weight[: prior.grid.vocabulary]
        no_bias = output.new_zeros(len(output))
        self.output = after_norm(prior.norm, output, no_bias, dtype)


def block_weights(block: Block, dtype: torch.dtype) -> BlockWeights:
    attention, width = block.attention, block.attention.out.in_features
    scale = torch.ones_like(attention.qkv.bias, dtype=torch.float32)
    scale[:width] /= math.sqrt(width // attention.heads)
    qkv, bias = attention.qkv.weight * scale[:, None], attention.qkv.bias * scale
    return BlockWeights(
        qkv=after_norm(
            block.attention_norm,
            qkv,
            bias,
            dtype,
            blocks_of_heads(3 * attention.heads, width // attention.heads, dtype),
        ),
        out=Product(attention.out.weight, attention.out.bias, dtype),
        up=after_norm(block.feed_forward_norm, block.up.weight, block.up.bias, dtype),
        down=Product(block.down.weight, block.down.bias, dtype),
    )


def after_norm(
    norm: nn.LayerNorm, weight: Tensor, bias: Tensor, dtype: torch.dtype, blocks: int | None = None
) -> Product:
    """With the gain and the bias of the norm before it folded in, in float32: weights in bfloat16 round once."""
    weight, bias = weight.float(), bias.float()
    return Product(weight * norm.weight, bias + weight @ norm.bias.float(), dtype, blocks)


def normalised(room: Room) -> None:
    """LayerNorm without gain and bias."""
    rows = room.stream if room.stream.dim() == 2 else join(room.stream)
    room.rows.copy_(F.layer_norm(rows, rows.shape[1:]))


class MinGPTStepper:
    """One place, or a window of places, per call. What comes before the codes goes through beforehand, all at once, and
    its last place again with the first code: it is the start from which that is predicted."""

    @torch.inference_mode()
    def __init__(self, prior: MinGPT, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, dtype = prior.positions.device, step_dtype(prior.positions)
        weights = prepared(prior, dtype, lambda: StepWeights(prior, dtype), rows=batch)
        self.embedding, self.positions, self.output = weights.embedding, weights.positions, weights.output
        prefix = prior.prefix(batch, condition.to(device))
        self.start = prefix[:, -1:]
        self.before, self.codes = prior.prefix_length - 1, prior.grid.size
        self.decoder = Decoder(weights.weights, batch, self.before + self.codes, dtype, device)
        self.position = 0
        if self.before:
            seen = prior.mask(prior.prefix_length)
            embedded = F.embedding(prefix, self.embedding) + self.positions[: prior.prefix_length]
            with torch.autocast(device.type, enabled=False):
                self.decoder.read(embedded, None if seen is None else ~seen[None])

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.positions.device.type, enabled=False):
            tokens = self.start if previous is None else previous
            place = self.before + self.position
            x = F.embedding(tokens[:, 0], self.embedding) + self.positions[place]
            self.position += 1
            return self.output.joined(self.decoder.step(x, place)).float()[:, None]

    @torch.inference_mode()
    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        with torch.autocast(self.positions.device.type, enabled=False):
            places = first[:, None] + torch.arange(previous.shape[1], device=first.device)
            tokens = torch.where(places == 0, self.start, previous.clamp(min=0))
            at = self.before + places.clamp(max=self.codes - 1)
            x = F.embedding(tokens, self.embedding) + F.embedding(at, self.positions)
            states = self.decoder.window(x, self.before + first).flatten(0, 1)
            return self.output.joined(states).float().unflatten(0, places.shape)
