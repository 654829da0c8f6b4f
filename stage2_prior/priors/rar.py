"""RAR: randomized autoregression (Yu et al. 2024, arXiv:2411.00776): codes in raster order, learned in random orders.

A causal transformer that trains on random orders of an image's codes, of a share of the images that falls to none in
the course of training. What it learns of both sides of a code stays, and sampling is plain raster order, with a cache.
Where any code may come next, a token must say which one is asked for: each has the position of its own code and, added
to it, a target-aware embedding of the position that comes next.

    input      start   class        code o0      ...   code on-2
    position           of the class o0           ...   on-2
    target             o0           o1           ...   on-1
    logits of          code o0      code o1      ...   code on-1

The class modulates every layer norm (AdaLN), together with a learned vector of the step: how many codes are known.
Guidance as published is `guidance_schedule: cosine` with `guidance_power: 2.75`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.draws import uniform
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.decoding.prepared import prepared
from stage2_prior.decoding.stepping_copy import stepping_copy
from stage2_prior.priors.base import AutoregressivePrior, Places
from stage2_prior.stepping import step_dtype

EPSILON = 1e-6  # of every layer norm
BEFORE = 2  # places before the codes: start and class


@dataclass(frozen=True, kw_only=True)
class RARConfig:
    """The published models have 16 heads and, B to XXL, 24, 24, 32, 40 layers of width 768, 1024, 1280, 1408."""

    kind: Literal["rar"] = "rar"
    layers: int = 8
    width: int = 256  # d
    heads: int = 8  # each of width / heads numbers
    hidden_width: int | None = None  # of the feed-forward; None: four times the width
    dropout: float = 0.1  # of what attention and feed-forward add to the residual stream, and inside the latter
    attention_dropout: float = 0.1  # of attention's shares
    permuted_until: float = 0.5  # share of the run up to which every image is learned in a random order
    raster_from: float = 0.75  # share of the run from which none is; in between their share falls linearly

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise UserError(f"width={self.width}, expected a multiple of heads={self.heads}")
        if self.hidden_width is not None and self.hidden_width < 1:
            raise UserError(
                f"hidden_width={self.hidden_width}, expected at least 1; leave it out for 4 times the width"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected a share from 0 to below 1")
        if not 0 <= self.permuted_until <= self.raster_from <= 1:
            raise UserError(
                f"permuted_until={self.permuted_until} and raster_from={self.raster_from}, expected shares of the run "
                "from 0 to 1, the first not after the second; 0.5 and 0.75 are the paper's"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        return self.hidden_width or 4 * self.width

    def permuted_share(self, progress: float) -> float:
        """Share of the images that are learned in a random order when `progress`, 0 to 1, of the run is done."""
        if progress < self.permuted_until:
            return 1.0
        if progress >= self.raster_from:
            return 0.0
        return (self.raster_from - progress) / (self.raster_from - self.permuted_until)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Causal self-attention, whose queries and keys pass a layer norm of each head."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.query_norm = nn.LayerNorm(config.head_width, EPSILON)
        self.key_norm = nn.LayerNorm(config.head_width, EPSILON)
        self.dropout = config.attention_dropout
        self.out = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `b heads n d`."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        return self.query_norm(q), self.key_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    def __init__(self, config: RARConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, config: RARConfig):
        super().__init__()
        self.modulation = nn.Linear(config.width, 6 * config.width)
        self.attention_norm = nn.LayerNorm(config.width, EPSILON)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width, EPSILON)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: b n d; condition: of each place, behind its SiLU, b n d."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        q, k, v = self.attention.project(modulated(self.attention_norm(x), shift1, scale1))
        x = x + gate1 * self.dropout(self.attention.attend(q, k, v, causal=True))
        return x + gate2 * self.dropout(self.feed_forward(modulated(self.feed_forward_norm(x), shift2, scale2)))

    def step(self, x: Tensor, condition: Tensor, keys: Tensor, values: Tensor, places: slice) -> Tensor:
        """As `forward` at these places, b m d, which see each other only if they are the first two. keys, values: b
        heads n d, of all places, where those of these are written."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        q, keys[:, :, places], values[:, :, places] = self.attention.project(
            modulated(self.attention_norm(x), shift1, scale1)
        )
        known = slice(places.stop)
        x = x + gate1 * self.attention.attend(q, keys[:, :, known], values[:, :, known], causal=places.start == 0)
        return x + gate2 * self.feed_forward(modulated(self.feed_forward_norm(x), shift2, scale2))


class RAR(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid."""

    kind = "rar"
    config_class = RARConfig
    config: RARConfig
    reads_given = False
    takes_orders = True

    def __init__(self, config: RARConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid, width = self.only_grid(), config.width
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.classes = nn.Embedding(num_classes + 1, width)  # the last one is the null label
        self.embedding = nn.Embedding(self.grid.vocabulary, width)
        self.places = nn.Parameter(torch.empty(BEFORE + self.grid.size, width))
        self.targets = nn.Parameter(torch.empty(self.grid.size, width))
        self.progress = nn.Parameter(torch.empty(1 + self.grid.size, width))  # of each place of the sequence
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, EPSILON, elementwise_affine=False)
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, self.grid.vocabulary)
        self.initialise()

    def initialise(self) -> None:
        """Normal of 0.02, and modulations of zero: a fresh block adds nothing to the residual stream."""
        for name, parameter in self.named_parameters():
            if "modulation" in name or (name.endswith("bias") and parameter.dim() == 1):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.trunc_normal_(parameter, std=0.02)

    def place_tables(self) -> dict[str, Places]:
        grid = ((self.grid.height, self.grid.width),)
        return {"places": Places(BEFORE, grid), "targets": Places(0, grid)}

    def training_order(self, batch: int, progress: float, device: torch.device) -> Tensor | None:
        share = self.config.permuted_share(progress)
        if share == 0:
            return None
        drawn = uniform(batch, 1 + self.grid.size, device=device)
        raster = torch.arange(self.grid.size, device=device)
        return torch.where(drawn[:, :1] < share, drawn[:, 1:].argsort(dim=1), raster)

    def class_vectors(self, batch: int, condition: Condition) -> Tensor:
        """`b d`"""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        """In the order of `condition`, where it has one."""
        tokens = self.sequence(codes, condition)  # b n
        order = condition.order
        if order is None:
            order = torch.arange(self.grid.size, device=tokens.device).expand_as(tokens)
        vectors = self.class_vectors(len(tokens), condition)[:, None]  # b 1 d
        start = (self.start + self.places[0]).expand(len(tokens), -1, -1)
        known = self.embedding(tokens[:, :-1]) + F.embedding(order[:, :-1], self.places[BEFORE:])
        known = torch.cat([vectors + self.places[1], known], dim=1) + F.embedding(order, self.targets)  # b n d
        x, modulation = torch.cat([start, known], dim=1), F.silu(vectors + self.progress)
        for block in self.blocks:
            x = block(x, modulation)
        return self.told(x[:, 1:], modulation[:, 1:])

    def told(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Logits `b n k` of the codes after these places, b n d."""
        scale, shift = self.output_modulation(modulation).chunk(2, dim=-1)
        return self.output(modulated(self.norm(x), shift, scale))

    @property
    def numbers_kept(self) -> int:
        return 2 * self.config.layers * (1 + self.grid.size) * self.config.width

    def stepper(self, batch: int, condition: Condition) -> RARStepper:
        return RARStepper(self, batch, condition)


class StepWeights(NamedTuple):
    """What sampling reads of a RAR, in the type that it computes in: once for each state of the weights."""

    prior: RAR
    places: Tensor  # 2+n d
    targets: Tensor  # n d

    @classmethod
    def of(cls, prior: RAR, dtype: torch.dtype) -> StepWeights:
        own = stepping_copy(prior, dtype)  # a stepper drops nothing out
        return cls(own, own.places.detach(), own.targets.detach())


class RARStepper:
    """One code per call: keys and values of earlier places wait in a cache that is allocated once. Computes in
    autocast's type where autocast is on when it is made, else in the weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: RAR, batch: int, condition: Condition):
        prior.check(batch, condition)
        config, (weight, *_) = prior.config, prior.parameters()
        device, dtype = weight.device, step_dtype(weight)
        condition = condition.to(device)
        weights = prepared(prior, (dtype, prior.training), lambda: StepWeights.of(prior, dtype), rows=batch)
        self.prior, self.places, self.targets = weights
        self.order = condition.order  # b n; None: raster
        self.cache = torch.empty(
            config.layers, 2, batch, config.heads, 1 + prior.grid.size, config.head_width, dtype=dtype, device=device
        ).unbind()
        with torch.autocast(device.type, enabled=False):
            self.vectors = self.prior.class_vectors(batch, condition)[:, None]  # b 1 d
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        prior, position = self.prior, self.position
        with torch.autocast(self.places.device.type, enabled=False):
            if previous is None:
                start = (prior.start + self.places[0]).expand(len(self.vectors), -1, -1)
                first = self.vectors + self.places[1] + self.of_code(self.targets, 0)
                x, here = torch.cat([start, first], dim=1), slice(0, BEFORE)
            else:
                place = self.of_code(self.places[BEFORE:], position - 1)
                x = prior.embedding(previous) + place + self.of_code(self.targets, position)
                here = slice(position + 1, position + 2)
            modulation = F.silu(self.vectors + prior.progress[here])
            for block, (keys, values) in zip(cast("list[Block]", prior.blocks), self.cache, strict=True):
                x = block.step(x, modulation, keys, values, here)
            self.position += 1
            return prior.told(x[:, -1:], modulation[:, -1:]).float()

    def of_code(self, table: Tensor, number: int) -> Tensor:
        """Rows of a table, `n d`, of the codes that come as this number: `b 1 d`, or `1 d` for all."""
        if self.order is None:
            return table[number : number + 1]
        return F.embedding(self.order[:, number : number + 1], table)
