"""PixelSNAIL one position at a time: every feature is computed once, and what later positions need of it is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from stage2_prior.condition import Condition
from stage2_prior.decoding.column_blocks import ColumnBlocks, join
from stage2_prior.priors.gated_convolutions import (
    CausalConvolution,
    CodeConvolution,
    Convolution,
    GatedResidual,
    place_features,
)
from stage2_prior.priors.given_codes import GivenCodes
from stage2_prior.priors.pixelsnail_layers import Block, GateBias, PixelSNAILConfig
from stage2_prior.stepping import step_dtype


class PixelSNAILParts(Protocol):
    """What of a PixelSNAIL its steps are made of."""

    config: PixelSNAILConfig
    grid: Grid
    above: CodeConvolution
    left: CodeConvolution
    given_codes: GivenCodes | None
    blocks: nn.ModuleList  # of Block
    output_blocks: nn.Sequential  # of GatedResidual
    output: Convolution

    def check(self, batch: int, condition: Condition) -> None: ...
    def seen(self, codes: Tensor) -> Tensor: ...


def matrix(convolution: Convolution) -> Tensor:
    """Of a 1x1 convolution, to multiply rows with: c d."""
    return convolution.weight().flatten(1).t()


def bias_of(convolution: Convolution) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


class StepConvolutions:
    """One of the two causal convolutions of every residual block, all L of them at once. They can be: none sees its own
    position, so all that they need is known when the position before is done.

    What they see of the rows above is computed for a whole row, what they see of their own row at each position. The
    views of the buffers are made once: at every step they would cost as much as the arithmetic.
    """

    def __init__(self, convolutions: Sequence[CausalConvolution], batch: int, columns: int, dtype: torch.dtype):
        weights = torch.stack([convolution.weight() for convolution in convolutions]).to(dtype)
        layers, out, self.width, rows, taps = weights.shape
        self.reach = reach = taps // 2
        self.above = rearrange(weights[..., :-1, :], "l out d row tap -> tap l (row d) out").contiguous()
        self.beside = rearrange(weights[..., -1, :reach], "l out d tap -> l (tap d) out").contiguous()
        self.bias = torch.stack([bias_of(one) for one in convolutions])[:, None].to(dtype)  # l 1 out
        # The rows above lie beside each other at every column: taps of one column are one product for all rows.
        self.rows = weights.new_zeros(layers, columns + 2 * reach, batch, (rows - 1) * self.width)
        self.row = weights.new_zeros(layers, batch, (reach + columns) * self.width)  # l b (column d)
        self.inputs = self.row.split(self.width, dim=2)[reach:]  # l b d, of each column: written when it is done
        self.taps = [self.row.narrow(2, column * self.width, reach * self.width) for column in range(columns)]
        self.from_above = weights.new_empty(layers, columns * batch, out)
        self.plus = self.from_above.split(batch, dim=1)  # l b out, of each column

    def begin_row(self, bias: Tensor) -> None:
        """bias: l 1 out, or l (w b) out."""
        self.rows[..., : -self.width] = self.rows[..., self.width :].clone()
        done = self.row[..., self.reach * self.width :]
        self.rows[:, self.reach : -self.reach, :, -self.width :] = rearrange(
            done, "l b (column d) -> l column b d", d=self.width
        )
        self.from_above.copy_(bias)
        for tap, weight in enumerate(self.above):
            seen = self.rows[:, tap : tap + len(self.plus)].flatten(1, 2)  # l (w b) (row d)
            self.from_above.baddbmm_(seen, weight)

    def at(self, column: int) -> Tensor:
        """l b out"""
        return torch.baddbmm(self.plus[column], self.taps[column], self.beside)


class StepProjections:
    """The ends of blocks without attention. What a place adds is known beforehand."""

    def __init__(self, blocks: Sequence[Block], grid: Grid, batch: int, dtype: torch.dtype):
        outs = [cast(Convolution, block.out) for block in blocks]
        width = len(outs[0].gain)
        places = place_features(grid, outs[0].gain).flatten(1).t()  # n 2
        self.places = [(bias_of(out) + places @ matrix(out)[width:]).to(dtype).unsqueeze(1).unbind() for out in outs]
        self.matrices = [matrix(out)[:width].to(dtype) for out in outs]
        self.inputs = self.matrices[0].new_empty(len(blocks), batch, width)

    def through(self, x: Tensor, sums: Tensor, position: int) -> Tensor:
        """x, b d, through all blocks. sums: of what the residual blocks of each add, blocks b d."""
        for own, added, places, weight in zip(self.inputs, sums, self.places, self.matrices, strict=True):
            own.copy_(x)
            x = torch.addmm(places[position], x + added, weight)
        return x


class StepAttention:
    """The ends of blocks with attention. What a place adds is known beforehand, and the scale of the scores is part of
    the queries' weights. No position attends to itself, so keys and values of all blocks are computed together when a
    position is done; they wait in a cache that is allocated once."""

    def __init__(self, blocks: Sequence[Block], grid: Grid, batch: int, dtype: torch.dtype):
        width, heads = 2 * len(blocks[0].attention.query.gain), blocks[0].attention.heads
        raw = place_features(grid, blocks[0].attention.query.gain).flatten(1).t()  # n 2
        activated = F.elu(raw)
        self.queries = [StepQuery(block, raw, activated, batch, dtype) for block in blocks]
        first, second, key_value, first_bias, second_bias, key_value_bias = (
            torch.stack(parts).to(dtype)
            for parts in zip(*(key_weights(block, raw, activated) for block in blocks), strict=True)
        )
        self.first, self.second, self.key_value = first, second, key_value
        self.first_bias = first_bias.unsqueeze(2).unbind(1)  # of each position: blocks 1 d
        self.second_bias = second_bias.unsqueeze(1)  # blocks 1 2(2d+2)
        self.key_value_bias = key_value_bias.unsqueeze(2).unbind(1)
        # What entered each block and what left its residual blocks, beside each other.
        self.pairs = first.new_empty(len(blocks), batch, 2 * width)
        self.inputs, self.nears = self.pairs.split(width, dim=2)
        cache = first.new_empty(len(blocks), 2, batch, heads, grid.size, width // 2 // heads)  # two: keys, values
        self.here = cache.unbind(4)  # of each position: blocks two b heads d
        self.cache = rearrange(cache, "blocks two b heads n d -> (blocks two) (b heads) n d")

    def through(self, x: Tensor, sums: Tensor, position: int) -> Tensor:
        """x, b d, through all blocks. sums: of what the residual blocks of each add, blocks b d."""
        known = self.cache[:, :, :position].unbind()
        parts = zip(self.queries, known[::2], known[1::2], self.inputs, self.nears, sums, strict=True)
        for query, keys, values, own, near, added in parts:
            own.copy_(x)
            x = query(torch.add(x, added, out=near), keys, values, position)
        hidden = F.elu(torch.baddbmm(self.first_bias[position], F.elu(self.pairs), self.first), inplace=True)
        gated = F.glu(torch.baddbmm(self.second_bias, hidden, self.second), dim=-1)  # blocks b 2d+2
        raw = torch.baddbmm(self.key_value_bias[position], self.pairs, self.key_value[:, : self.pairs.shape[2]])
        key_value = raw.baddbmm_(gated, self.key_value)  # blocks b (two heads d)
        here = self.here[position]
        here.copy_(rearrange(key_value, "blocks b (two heads d) -> blocks two b heads d", two=2, heads=here.shape[3]))
        return x


def key_weights(block: Block, raw: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
    """Matrices of the key's residual block and of key and value, then what is added to each product: the first and the
    last with what each place adds, n d. raw, activated: places, n 2."""
    first, second, attention = block.keys.first, block.keys.second, block.attention
    key_value = torch.cat([matrix(attention.key), matrix(attention.value)], dim=1)
    bias = torch.cat([bias_of(attention.key), bias_of(attention.value)])
    return (
        matrix(first)[:-2],
        matrix(second),
        key_value,
        bias_of(first) + activated @ matrix(first)[-2:],
        bias_of(second),
        bias + raw @ key_value[-2:],
    )


class StepGate:
    """A product whose one half opens the other, b d -> b d': `glu` of `addmm`, whose views are made once."""

    def __init__(self, convolution: Convolution, batch: int, dtype: torch.dtype):
        self.weight, self.bias = matrix(convolution).to(dtype), bias_of(convolution).to(dtype)
        self.product = self.weight.new_empty(batch, len(self.bias))
        self.signal, self.opening = self.product.chunk(2, dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        torch.addmm(self.bias, x, self.weight, out=self.product)
        return self.signal * self.opening.sigmoid_()


class StepQuery:
    """A block's weights for what is done at a position itself: to ask, and to take in the answer."""

    def __init__(self, block: Block, raw: Tensor, activated: Tensor, batch: int, dtype: torch.dtype):
        """raw, activated: places, n 2."""
        first, second, query = block.queries.first, block.queries.second, block.attention.query
        out, side = cast(GatedResidual, block.out), cast(Convolution, cast(GatedResidual, block.out).side)
        width = len(out.first.gain)
        scale = (len(query.gain) // block.attention.heads) ** -0.5
        # Of the first product: the hidden layer of the query's residual block, and that of the output's.
        hidden_bias = (bias_of(out.first) + bias_of(side)).expand(len(raw), -1)
        biases = bias_of(first) + activated @ matrix(first)[width:], hidden_bias
        self.first = torch.cat([matrix(first)[:width], matrix(out.first)], dim=1).to(dtype)
        self.first_bias = torch.cat(biases, dim=1).to(dtype).unsqueeze(1).unbind()  # of each position
        self.second, self.out = StepGate(second, batch, dtype), StepGate(out.second, batch, dtype)
        self.query = (matrix(query) * scale).to(dtype)
        self.near_query = self.query[:width]
        self.query_bias = ((bias_of(query) + raw @ matrix(query)[width:]) * scale).to(dtype).unsqueeze(1).unbind()
        self.side = matrix(side).to(dtype)

    def __call__(self, near: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """near: b d; keys, values: (b heads) n d, of the positions before -> b d."""
        query_hidden, hidden = torch.addmm(self.first_bias[position], F.elu(near), self.first).chunk(2, dim=1)
        gated = self.second(F.elu(query_hidden))
        query = torch.addmm(self.query_bias[position], near, self.near_query).addmm_(gated, self.query)
        scores = torch.bmm(query.view(len(keys), 1, -1), keys.mT)
        attended = torch.bmm(scores.softmax(dim=-1), values).view(len(near), -1)
        hidden = torch.addmm(hidden, F.elu(attended, inplace=True), self.side)
        return near + self.out(F.elu(hidden, inplace=True))


class StepResidual:
    """A residual block of 1x1 convolutions: b d -> b d."""

    def __init__(self, block: GatedResidual, batch: int, dtype: torch.dtype):
        self.first, self.first_bias = matrix(block.first).to(dtype), bias_of(block.first).to(dtype)
        self.second = StepGate(block.second, batch, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.second(F.elu(torch.addmm(self.first_bias, F.elu(x), self.first), inplace=True))


def stamps(prior: PixelSNAILParts) -> Tensor:
    """What each code adds to the features of the places that see it, k (rows columns d): of the rows from its own on,
    and of as many columns before as after."""
    above, left = (
        rearrange(part.weight().flip(2, 3), "d k rows columns -> k rows columns d")
        for part in (prior.above, prior.left)
    )
    rows, columns = left.shape[1], above.shape[2]
    stamp = above.new_zeros(len(above), rows, columns, above.shape[3])
    stamp[:, 1:] += above  # from the next row on
    stamp[:, :, columns // 2 + 1 :] += left  # from the next column on
    return stamp.flatten(1)


class PixelSNAILStepper:
    """One position of PixelSNAIL per call, each feature computed once: an image takes no more arithmetic than one full
    pass. Computes in autocast's type where autocast is on when it is made, else in the weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: PixelSNAILParts, batch: int, condition: Condition):
        prior.check(batch, condition)
        weight, grid, reach = prior.output.direction, prior.grid, prior.config.kernel_size // 2
        condition, dtype = condition.to(weight.device), step_dtype(weight)
        self.columns = grid.width
        # The features of no codes at all, with a margin for what falls beyond the grid; every code adds its stamp.
        none = torch.full((batch, grid.height, grid.width), grid.vocabulary, device=weight.device)
        blank = F.pad(prior.seen(none), (reach, reach, 0, reach)).to(dtype)
        self.canvas = rearrange(blank, "b d h w -> b h w d").contiguous()
        self.stamps, self.stamp_size = stamps(prior).to(dtype), (reach + 1, 2 * reach + 1)

        blocks = cast("list[Block]", prior.blocks)
        residuals = [residual for block in blocks for residual in cast("list[GatedResidual]", block.residuals)]
        gate_biases = [bias for block in blocks for bias in cast("list[GateBias]", block.gate_biases)]
        self.first, self.second = (
            StepConvolutions(cast("list[CausalConvolution]", convolutions), batch, grid.width, dtype)
            for convolutions in ([one.first for one in residuals], [one.second for one in residuals])
        )
        self.gate_bias = self.second.bias  # l 1 2d, or with classes l (w b) 2d
        if condition.labels is not None:
            classes = torch.stack([cast(nn.Embedding, bias.classes)(condition.labels) for bias in gate_biases])
            self.gate_bias = self.gate_bias + classes.to(dtype).repeat(1, grid.width, 1)
        self.features: Tensor | None = None
        if prior.given_codes is not None:
            given_codes = copy.deepcopy(prior.given_codes).eval()  # without dropout, and the prior stays as it is
            features = given_codes(cast(Codes, condition.codes)).to(dtype)
            self.features = rearrange(features, "b d h w -> h (w b) d").contiguous()
            self.given = torch.stack([matrix(cast(Convolution, bias.given)) for bias in gate_biases]).to(
                dtype
            )  # l c 2d

        self.far = (StepAttention if prior.config.attention else StepProjections)(blocks, grid, batch, dtype)
        width = prior.config.width
        self.sums = self.canvas.new_zeros(len(blocks), prior.config.residual_blocks + 1, batch, width)
        self.output_blocks = [StepResidual(cast(GatedResidual, block), batch, dtype) for block in prior.output_blocks]
        self.output = ColumnBlocks(prior.output.weight().flatten(1), math.gcd(8, grid.vocabulary), dtype)
        self.bias = bias_of(prior.output).to(dtype)
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.canvas.device.type, enabled=False):
            return self._next(None if previous is None else previous[:, 0])[:, None]

    def _next(self, previous: Tensor | None) -> Tensor:
        row, column = divmod(self.position, self.columns)
        if previous is not None:
            self.put(previous, *divmod(self.position - 1, self.columns))
        if column == 0:
            self.begin_row(row)
        x = self.canvas[:, row, column + self.first.reach]  # b d
        # No causal convolution sees its own position: what residual blocks add is known before what they add it to.
        hidden = F.elu(self.first.at(column), inplace=True)  # l b d
        self.second.inputs[column].copy_(hidden)
        gated = F.glu(self.second.at(column), dim=-1)
        torch.cumsum(gated.view(self.sums[:, 1:].shape), dim=1, out=self.sums[:, 1:])
        x = self.far.through(x, self.sums[:, -1], self.position)
        inputs = self.far.inputs[:, None] + self.sums[:, :-1]  # of each residual block
        self.first.inputs[column].copy_(F.elu(inputs, inplace=True).flatten(0, 1))
        for block in self.output_blocks:
            x = block(x)
        self.position += 1
        return (join(self.output(F.elu(x))) + self.bias).float()

    def put(self, codes: Tensor, row: int, column: int) -> None:
        """The codes b of a place, for all places that see it."""
        rows, columns = self.stamp_size
        stamp = F.embedding(codes, self.stamps).view(len(codes), rows, columns, -1)
        self.canvas[:, row : row + rows, column : column + columns] += stamp

    def begin_row(self, row: int) -> None:
        self.first.begin_row(self.first.bias)
        bias = self.gate_bias
        if self.features is not None:
            bias = bias + torch.matmul(self.features[row], self.given)  # l (w b) 2d
        self.second.begin_row(bias)
