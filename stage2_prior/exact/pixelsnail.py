"""The exact walk of `PixelSNAIL`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, Grid
from common import exact
from common.exact import factors_of, product_of
from stage2_prior.condition import Condition
from stage2_prior.exact.convolution import PlaceResidual, Taps, bias_of, glu, product, weight_of
from stage2_prior.exact.given_codes import given_features
from stage2_prior.priors.gated_convolutions import CausalConvolution, Convolution, GatedResidual
from stage2_prior.priors.pixelsnail import PixelSNAIL
from stage2_prior.priors.pixelsnail_layers import Block, GateBias


class ExactPixelSNAIL:
    """A `Stepper` of float64 logits that are the same on every machine."""

    @torch.inference_mode()
    def __init__(self, prior: PixelSNAIL, batch: int, condition: Condition):
        prior.check(batch, condition)
        condition = condition.to(prior.output.direction.device)
        blocks = cast("list[Block]", prior.blocks)
        residuals = [residual for block in blocks for residual in cast("list[GatedResidual]", block.residuals)]
        self.columns = prior.grid.width
        self.seen = SeenCodes(prior, batch)
        self.first, self.second = (
            CausalConvolutions(cast("list[CausalConvolution]", convolutions), batch, self.columns)
            for convolutions in ([one.first for one in residuals], [one.second for one in residuals])
        )
        gate_biases = [bias for block in blocks for bias in cast("list[GateBias]", block.gate_biases)]
        self.gate_bias = self.second.bias  # l 1 1 2d, or with classes l 1 b 2d
        if condition.labels is not None:
            classes = [cast(nn.Embedding, bias.classes).weight.double()[condition.labels] for bias in gate_biases]
            self.gate_bias = self.gate_bias + torch.stack(classes)[:, None]
        self.features: Tensor | None = None  # of given codes, h w b c
        if prior.given_codes is not None:
            self.features = given_features(prior.given_codes, cast(Codes, condition.codes))
            self.given = [product(cast(Convolution, bias.given)) for bias in gate_biases]
        end = AttentionEnd if prior.config.attention else ProjectionEnd
        self.ends = [end(block, batch, prior.grid) for block in blocks]
        self.output_blocks = [PlaceResidual(cast(GatedResidual, block)) for block in prior.output_blocks]
        self.output = product(prior.output)
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        row, column = divmod(self.position, self.columns)
        if previous is not None:
            self.seen.put(previous[:, 0], (self.position - 1) % self.columns)
        if column == 0:
            self.begin_row(row)
        # No causal convolution sees its own place: what residual blocks add is known before what they add it to.
        self.second.put(exact.elu(self.first.at(column)), column)
        sums = glu(self.second.at(column)).chunk(len(self.ends))  # of each block, layers b d
        x = self.seen.at(column)
        inputs = []  # of each residual block
        for end, added in zip(self.ends, sums, strict=True):
            near = x
            for one in added:
                inputs.append(near)
                near = near + one
            x = end(x, near, self.position)
        self.first.put(exact.elu(torch.stack(inputs)), column)
        for block in self.output_blocks:
            x = block(x)
        self.position += 1
        return self.output(exact.elu(x))[:, None]

    def begin_row(self, row: int) -> None:
        self.seen.begin_row()
        self.first.begin_row(self.first.bias)
        bias = self.gate_bias
        if self.features is not None:
            given = torch.stack([given(self.features[row]) for given in self.given])  # l w b 2d
            bias = given.add_(bias)
        self.second.begin_row(bias)


class SeenCodes:
    """What places see of the codes near them, in the rows that codes still reach: every code adds its stamp to the
    places that see it, in the order in which codes become known."""

    def __init__(self, prior: PixelSNAIL, batch: int):
        above, left = (
            rearrange(weight_of(part).flip(2, 3), "d k rows columns -> k rows columns d")
            for part in (prior.above, prior.left)
        )
        self.reach = reach = above.shape[1]
        self.stamps = above.new_zeros(len(above), reach + 1, 2 * reach + 1, above.shape[3])
        self.stamps[:, 1:] += above  # from the next row on
        self.stamps[:, :, reach + 1 :] += left  # from the next column on
        # A row before any code, with a margin for what falls beyond the grid. Nothing is left of the first column.
        self.blank = above.new_zeros(prior.grid.width + 2 * reach, above.shape[3])
        self.blank[reach + 1 :] = bias_of(prior.left)
        first = self.blank.clone()  # nothing is above it
        self.blank += bias_of(prior.above)
        # From the row above the grid on: b rows columns d
        self.canvas = self.blank.repeat(batch, reach + 1, 1, 1)
        self.canvas[:, 1] = first

    def begin_row(self) -> None:
        self.canvas[:, :-1] = self.canvas[:, 1:].clone()
        self.canvas[:, -1] = self.blank

    def put(self, codes: Tensor, column: int) -> None:
        """The codes b at one column of this row."""
        self.canvas[:, :, column : column + self.stamps.shape[2]].add_(self.stamps[codes])

    def at(self, column: int) -> Tensor:
        """b d"""
        return self.canvas[:, 0, column + self.reach]


class CausalConvolutions:
    """One of the two causal convolutions of every residual block, all L of them at once. What they see of the rows
    above is computed for a whole row, what they see of their own row at each place."""

    def __init__(self, convolutions: Sequence[CausalConvolution], batch: int, columns: int):
        weights = torch.stack([weight_of(convolution) for convolution in convolutions])  # l out d row tap
        layers, _, width, rows, taps = weights.shape
        self.columns, self.reach = columns, taps // 2
        self.above = [Taps(weight[:, :, :-1]) for weight in weights]
        beside = rearrange(weights[..., -1, : self.reach], "l out d tap -> l out (tap d)")
        self.beside = factors_of(beside).mT
        self.bias = torch.stack([bias_of(convolution) for convolution in convolutions])[:, None, None]  # l 1 1 out
        # The rows above on grids, and this one as it is: l rows w b d and l b columns d
        self.rows = factors_of(weights.new_empty(layers, 0, columns, batch, width))
        self.rows_above = rows - 1  # that are seen
        self.row = weights.new_zeros(layers, batch, self.reach + columns, width)
        self.from_above = weights.new_empty(layers, columns, batch, weights.shape[1])  # l w b out

    def begin_row(self, bias: Tensor) -> None:
        """bias: l w b out, w and b being 1 where it is one for all."""
        self.from_above.copy_(bias)
        for above, total, rows in zip(self.above, self.from_above, self.rows, strict=True):
            above.add_to(total[None], rows, self.rows_above - len(rows), self.reach)

    def put(self, inputs: Tensor, column: int) -> None:
        """l b d, of a place that is done. The last one completes the row."""
        self.row[:, :, self.reach + column] = inputs
        if column == self.columns - 1:
            row = self.row[:, :, self.reach :].transpose(1, 2)
            self.rows = torch.cat([self.rows[:, 1 - self.rows_above :], factors_of(row)[:, None]], dim=1)

    def at(self, column: int) -> Tensor:
        """l b out"""
        seen = factors_of(self.row[:, :, column : column + self.reach].flatten(2))
        return product_of(seen, self.beside).add_(self.from_above[:, column])


class ProjectionEnd:
    """The end of a block without attention."""

    def __init__(self, block: Block, batch: int, grid: Grid):
        out = cast(Convolution, block.out)
        self.out, self.places = product(out), place_features(grid, out.gain.device)

    def __call__(self, x: Tensor, near: Tensor, position: int) -> Tensor:
        """What leaves the block, b d. x: what entered it; near: what its residual blocks made of that."""
        return self.out(located(near, self.places[position]))


class AttentionEnd:
    """The end of a block with attention, and the keys and values of the places so far."""

    def __init__(self, block: Block, batch: int, grid: Grid):
        attention = block.attention
        self.keys, self.queries = PlaceResidual(block.keys), PlaceResidual(block.queries)
        self.query, self.key, self.value = (
            product(convolution) for convolution in (attention.query, attention.key, attention.value)
        )
        self.out = PlaceResidual(cast(GatedResidual, block.out))
        width, device = len(attention.query.gain) // attention.heads, attention.query.gain.device
        self.shape, self.scale = (batch * attention.heads, 1, width), 1 / math.sqrt(width)
        self.attention = exact.Attention(batch * attention.heads, grid.size, width, device)
        self.places = place_features(grid, device)

    def __call__(self, x: Tensor, near: Tensor, position: int) -> Tensor:
        """As of `ProjectionEnd`."""
        here = located(near, self.places[position])
        queries = self.query(self.queries(here)).mul_(self.scale)
        attended = torch.zeros_like(queries)  # the first place has none to attend to
        if position > 0:
            attended = self.attention(queries.view(self.shape)).view_as(queries)
        keys = self.keys(torch.cat([x, here], dim=1))
        self.attention.add(self.key(keys).view(self.shape), self.value(keys).view(self.shape))
        return self.out(near, attended)


def located(x: Tensor, place: Tensor) -> Tensor:
    """b d -> b d+2, with the features of a place, 2."""
    return torch.cat([x, place.expand(len(x), -1)], dim=1)


def place_features(grid: Grid, device: torch.device) -> Tensor:
    """Row and column of each place, from -1/2 to below 1/2: n 2."""
    rows, columns = ([number / size - 0.5 for number in range(size)] for size in (grid.height, grid.width))
    return torch.tensor([(row, column) for row in rows for column in columns], dtype=torch.float64, device=device)
