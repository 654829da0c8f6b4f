"""The transformer of Open-MAGVIT2 (Luo et al. 2024, arXiv:2409.04410, section 3.2): LlamaGen's blocks over codes that
are several at each place, factors of one of a large vocabulary (`factorized_bits` of LFQ).

    places    class    sum of place 0   sum of place 1   ...     sum: of the embeddings of a place's codes
    walks       |            |                |                  spatial blocks, over all places
              state 0     state 1          state 2
                |
    factors   state    code 0   code 1   ...                     embeddings of the codes of one place
    walks       |        |        |                              factor blocks, over the codes of a place
              code 0   code 1   code 2                           one norm, and logits of each factor

It is an RQ-Transformer (rq_transformer.py) but for its blocks, no sums inside a place, and nothing between its two
stacks. The class has no position, its queries and keys are zero; and so, as published, are those of the first code of
each place: the factors are turned by the first rows of the places' own table, of which row 0 is the class's.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import NO_CODE, AutoregressivePrior
from stage2_prior.priors.llamagen import EPSILON, Block, LlamaGenConfig, place_turns
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class OpenMAGVIT2GPTConfig:
    """The published models, B to XL, have 24, 36 and 48 spatial layers, 2, 3 and 4 of the factors, width = 1024, 1280
    and 1536, and heads of 64 numbers."""

    kind: Literal["open_magvit2_gpt"] = "open_magvit2_gpt"
    layers: int = 8  # over the places
    factor_layers: int = 2  # over the codes of a place
    width: int = 256  # d, of both
    heads: int = 8  # of both, each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    hidden_width: int | None = None  # of SwiGLU; None: 8/3 of the width, rounded up to a multiple of 256
    dropout: float = 0.0  # of the embedded places
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream

    def __post_init__(self) -> None:
        if self.factor_layers < 1:
            raise UserError(f"factor_layers={self.factor_layers}, expected at least 1")
        _ = self.network  # refuses impossible sizes

    @property
    def network(self) -> LlamaGenConfig:
        return LlamaGenConfig.sizes_of(self)


class OpenMAGVIT2GPT(AutoregressivePrior):
    """Place by place in raster order, all codes of a place before the next. Raises UserError when the grids of the
    codes have different sides."""

    kind = "open_magvit2_gpt"
    config_class = OpenMAGVIT2GPTConfig
    config: OpenMAGVIT2GPTConfig
    reads_given = False

    def __init__(self, config: OpenMAGVIT2GPTConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        if len({(grid.height, grid.width) for grid in code_spec.grids}) > 1:
            raise UserError(
                f"got codes of {code_spec.describe()}, expected grids of equal sides: an {self.kind} prior models the "
                "factors of codes; take a transformer prior for grids of several sizes"
            )
        self.network = config.network
        self.factors = len(code_spec.grids)
        self.classes = nn.Embedding(num_classes + 1, config.width)  # the last one is the null label
        self.code_embeddings = nn.ModuleList(nn.Embedding(grid.vocabulary, config.width) for grid in code_spec.grids)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(self.network) for _ in range(config.layers))
        self.factor_blocks = nn.ModuleList(Block(self.network) for _ in range(config.factor_layers))
        self.norm = nn.RMSNorm(config.width, EPSILON)
        self.outputs = nn.ModuleList(nn.Linear(config.width, grid.vocabulary, bias=False) for grid in code_spec.grids)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def sequence(self, codes: Codes, condition: Condition) -> Tensor:
        """`b n`: place after place, and at each the codes of all factors."""
        super().sequence(codes, condition)  # which checks both
        return rearrange(torch.stack(codes), "factor b h w -> b (h w factor)")

    def grids_of(self, sequence: Tensor) -> tuple[Tensor, ...]:
        height = self.code_spec.grids[0].height
        return tuple(rearrange(sequence, "b (h w factor) -> factor b h w", h=height, factor=self.factors))

    def class_vectors(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, what stands before the first place."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def turns(self) -> tuple[Tensor, Tensor]:
        """Of the places and of the factors, see `place_turns`. No buffers: a model in bfloat16 would round them."""
        head_width, device = self.network.head_width, self.classes.weight.device
        grid = rows_for(self.code_spec.grids[0], self.factors)
        table = place_turns(grid, 1, head_width, device)
        return table[: self.code_spec.grids[0].size], table[: self.factors]

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        sequence = self.sequence(codes, condition)
        batch, (over_places, over_factors) = len(sequence), self.turns()
        tokens = rearrange(sequence, "b (n factor) -> factor b n", factor=self.factors)
        embedded = [table(own) for table, own in zip(self.code_embeddings, tokens, strict=True)]  # factor, b n d
        start = self.class_vectors(batch, condition)[:, None]
        x = self.dropout(torch.cat([start, sum_of(embedded)[:, :-1]], dim=1))  # b n d
        for block in self.blocks:
            x = block(x, over_places, None)
        x = rearrange(torch.stack([x, *embedded[:-1]]), "factor b n d -> (b n) factor d")
        for block in self.factor_blocks:
            x = block(x, over_factors, None)
        states = self.norm(x).unbind(1)
        parts = [output(state) for output, state in zip(self.outputs, states, strict=True)]
        largest = max(part.shape[-1] for part in parts)
        parts = [F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE) for part in parts]
        return rearrange(torch.stack(parts), "factor (b n) k -> b (n factor) k", b=batch)

    @property
    def numbers_kept(self) -> int:
        places = self.config.layers * self.code_spec.grids[0].size + self.config.factor_layers * self.factors
        return 2 * places * self.config.width

    def stepper(self, batch: int, condition: Condition) -> OpenMAGVIT2GPTStepper:
        return OpenMAGVIT2GPTStepper(self, batch, condition)


def rows_for(grid: Grid, factors: int) -> Grid:
    """A grid as wide, with at least so many places: those of `grid` have the same rows and columns in it."""
    return Grid(grid.name, max(grid.height, math.ceil(factors / grid.width)), grid.width, grid.vocabulary)


def sum_of(parts: list[Tensor]) -> Tensor:
    """In the order in which steps add them up."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class StepWeights(NamedTuple):
    """What sampling reads of the prior, in the type that it computes in: once for each state of the weights."""

    prior: OpenMAGVIT2GPT
    over_places: Tensor  # n d_head/2
    over_factors: Tensor  # factors d_head/2

    @classmethod
    def of(cls, prior: OpenMAGVIT2GPT, dtype: torch.dtype) -> StepWeights:
        same = all(weight.dtype == dtype for weight in prior.parameters()) and not prior.training
        own = prior if same else copy.deepcopy(prior).to(dtype).eval()  # a stepper drops nothing out
        return cls(own, *prior.turns())


class OpenMAGVIT2GPTStepper:
    """One code per call: the factor blocks each time, the spatial ones before the first code of each place. Keys and
    values wait in caches that are allocated once; that of the factors is written over from place to place. Computes in
    autocast's type where autocast is on when it is made, else in the weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: OpenMAGVIT2GPT, batch: int, condition: Condition):
        prior.check(batch, condition)
        weight = prior.classes.weight
        device, dtype = weight.device, step_dtype(weight)
        self.weights = prepared(prior, (dtype, prior.training), lambda: StepWeights.of(prior, dtype))
        heads, width, own = prior.config.heads, prior.network.head_width, self.weights.prior

        def stack(blocks: nn.ModuleList, places: int) -> list[tuple[Block, tuple[Tensor, Tensor]]]:
            """Each block with its keys and values, b heads places d."""
            cache = torch.empty(len(blocks), 2, batch, heads, places, width, dtype=dtype, device=device).unbind()
            pairs = [(keys_values[0], keys_values[1]) for keys_values in cache]
            return list(zip(cast("list[Block]", blocks), pairs, strict=True))

        self.spatial = stack(own.blocks, len(self.weights.over_places))
        self.over_factors = stack(own.factor_blocks, prior.factors)
        with torch.autocast(device.type, enabled=False):
            self.sum = own.class_vectors(batch, condition.to(device))[:, None]  # b 1 d, of this place's codes so far
        self.factors, self.position = prior.factors, 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.sum.device.type, enabled=False):
            return self._next(previous)

    def _next(self, previous: Tensor | None) -> Tensor:
        place, factor = divmod(self.position, self.factors)
        own, x = self.weights.prior, self.sum
        if previous is not None:
            x = own.code_embeddings[factor - 1](previous)
            self.sum = x if factor == 1 % self.factors else self.sum + x
        if factor == 0:
            x = self.sum
            for block, (keys, values) in self.spatial:
                x = block.step(x, self.weights.over_places[place : place + 1], keys, values, place)
        for block, (keys, values) in self.over_factors:
            x = block.step(x, self.weights.over_factors[factor : factor + 1], keys, values, factor)
        self.position += 1
        return own.outputs[factor](own.norm(x)).float()
