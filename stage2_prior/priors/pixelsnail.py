"""PixelSNAIL of Chen et al. 2017 (arXiv:1712.09763), the prior of VQ-VAE-2, over one grid of codes in raster order.

Causal convolutions see what is near, and attention all codes before a position:

    codes -> [ gated residual blocks -> attention -> ] ... -> logits
                 |                         |
        given codes, class           row and column

The layers are those of the most used open implementation, vq-vae-2-pytorch, so that its weights fit
(stage2_prior/imports/pixelsnail.py). It has no classes: here a class shifts the gates, as a given code does.

None of its layers sees its own position, attention included. So what the first places of a row know of the last code in
the row above is what the kernels reach; all other codes before them they see.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from stage1_vq.codes import Codes, CodeSpec, Grid
from stage2_prior.condition import Condition
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.column_blocks import ColumnBlocks, join
from stage2_prior.priors.gated_convolutions import CausalConvolution, CodeConvolution, Convolution, GatedResidual
from stage2_prior.priors.given_codes import GivenCodes
from stage2_prior.stepping import step_dtype
from training.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig:
    kind: Literal["pixelsnail"] = "pixelsnail"
    blocks: int = 2  # residual blocks and attention each
    residual_blocks: int = 4  # of a block
    width: int = 128  # d, channels between residual blocks
    residual_width: int = 128  # channels inside a residual block
    kernel_size: int = 5  # of the causal convolutions: rows, the current one included, and columns
    attention: bool = True  # False: a block ends with a 1x1 convolution; attention grows with the square of a grid
    heads: int = 8  # of attention; all of them together have width / 2 channels
    output_blocks: int = 0  # residual blocks of 1x1 convolutions before the logits
    dropout: float = 0.1  # inside residual blocks, and of the shares of attention
    given_blocks: int = 3  # residual blocks over each grid of given codes; without given codes it means nothing
    given_width: int = 64  # channels of each given grid's features
    given_kernel_size: int = 3  # of the convolutions over given codes

    def __post_init__(self) -> None:
        for name in ("blocks", "residual_blocks", "width", "residual_width", "heads", "given_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in ("output_blocks", "given_blocks"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}, expected 0 or more")
        for name, least in (("kernel_size", 3), ("given_kernel_size", 1)):
            if getattr(self, name) < least or getattr(self, name) % 2 == 0:
                raise UserError(f"{name}={getattr(self, name)}, expected an odd number of at least {least}")
        if self.attention and self.width % (2 * self.heads):
            raise UserError(
                f"width={self.width} with heads={self.heads}, expected a width that is a multiple of {2 * self.heads}: "
                "the heads share half of it"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}, expected a share from 0 to below 1")


class Attention(nn.Module):
    """Each position attends to those before it, and not to itself: queries `b q h w`, keys `b k h w` -> `b d h w`. The
    first position has none to attend to: zeros."""

    def __init__(self, query_width: int, key_width: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.share_dropout = dropout
        self.query = Convolution(query_width, width)
        self.key = Convolution(key_width, width)
        self.value = Convolution(key_width, width)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q, k, v = (
            rearrange(x, "b (heads d) h w -> b heads (h w) d", heads=self.heads)
            for x in (self.query(queries), self.key(keys), self.value(keys))
        )
        # From the second position on, each sees the keys up to the one before it.
        dropout = self.share_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], dropout_p=dropout, is_causal=True
        )
        return rearrange(F.pad(attended, (0, 0, 1, 0)), "b heads (h w) d -> b (heads d) h w", h=queries.shape[2])


class GateBias(nn.Module):
    """What a class and given codes add to the gates of a residual block; None where a prior has neither."""

    def __init__(self, gates: int, num_classes: int, given_width: int):
        super().__init__()
        self.classes = nn.Embedding(num_classes + 1, gates) if num_classes else None  # the last is the null label
        self.given = Convolution(given_width, gates, bias=False) if given_width else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, labels: Tensor | None, features: Tensor | None) -> Tensor | None:
        """labels: b; features: b given_width h w -> b gates h w, or b gates 1 1 without given codes."""
        bias = None if self.classes is None else rearrange(self.classes(labels), "b d -> b d 1 1")
        if self.given is None:
            return bias
        return self.given(features) if bias is None else self.given(features) + bias


class Block(nn.Module):
    """b d h w -> b d h w: what is near, then what is far."""

    def __init__(self, config: PixelSNAILConfig, num_classes: int, given_width: int):
        super().__init__()
        width, dropout = config.width, config.dropout
        convolution = partial(CausalConvolution, kernel_size=config.kernel_size)
        count = range(config.residual_blocks)
        self.residuals = nn.ModuleList(GatedResidual(width, config.residual_width, convolution, dropout) for _ in count)
        self.gate_biases = nn.ModuleList(GateBias(2 * width, num_classes, given_width) for _ in count)
        self.out: GatedResidual | Convolution
        if config.attention:
            queries, keys = width + 2, 2 * width + 2  # with the place
            self.keys = GatedResidual(keys, width, Convolution, dropout)
            self.queries = GatedResidual(queries, width, Convolution, dropout)
            self.attention = Attention(queries, keys, width // 2, config.heads, dropout)
            self.out = GatedResidual(width, width, Convolution, dropout, side_width=width // 2)
        else:
            self.out = Convolution(width + 2, width)

    def forward(self, x: Tensor, places: Tensor, labels: Tensor | None, features: Tensor | None) -> Tensor:
        """places: b 2 h w."""
        near = x
        for residual, gate_bias in zip(self.residuals, self.gate_biases, strict=True):
            near = residual(near, gate_bias=gate_bias(labels, features))
        located = torch.cat([near, places], dim=1)
        if isinstance(self.out, Convolution):
            return self.out(located)
        keys = self.keys(torch.cat([x, located], dim=1))
        return self.out(near, side=self.attention(self.queries(located), keys))


def place_features(grid: Grid, like: Tensor) -> Tensor:
    """Row and column of each place, from -1/2 to below 1/2: 2 h w, of the type and device of `like`."""
    rows, columns = (torch.arange(n, device=like.device) / n - 0.5 for n in (grid.height, grid.width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(like.dtype)


class PixelSNAIL(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid, or when given codes do not fit it; see `GivenCodes`."""

    kind = "pixelsnail"
    config_class = PixelSNAILConfig
    config: PixelSNAILConfig

    def __init__(self, config: PixelSNAILConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid = self.only_grid()
        reach = config.kernel_size // 2
        kernels = (reach, config.kernel_size), (reach + 1, reach)  # rows and columns
        self.above = CodeConvolution(self.grid.vocabulary, config.width, kernels[0], (reach, reach, reach - 1, 0))
        self.left = CodeConvolution(self.grid.vocabulary, config.width, kernels[1], (reach - 1, 0, reach, 0))
        self.given_codes: GivenCodes | None = None
        if self.given:
            self.given_codes = GivenCodes(
                self.given, self.grid, config.given_width, config.given_blocks, config.given_kernel_size, config.dropout
            )
        given_width = 0 if self.given_codes is None else self.given_codes.width
        self.blocks = nn.ModuleList(Block(config, num_classes, given_width) for _ in range(config.blocks))
        self.output_blocks = nn.Sequential(
            *(
                GatedResidual(config.width, config.residual_width, Convolution, config.dropout)
                for _ in range(config.output_blocks)
            )
        )
        self.output = Convolution(config.width, self.grid.vocabulary)

    def seen(self, codes: Tensor) -> Tensor:
        """What each position sees of the codes near it: b h w -> b d h w."""
        # Moved by a row and by a column: a kernel ends at its own position, which must not see its own code.
        return F.pad(self.above(codes), (0, 0, 1, -1)) + F.pad(self.left(codes), (1, -1))

    def features(self, condition: Condition) -> Tensor | None:
        """Of the given codes, b d h w; None where there are none."""
        return None if self.given_codes is None else self.given_codes(cast(Codes, condition.codes))

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        batch = len(self.sequence(codes, condition))
        features = self.features(condition)
        x = self.seen(codes[0])
        places = repeat(place_features(self.grid, x), "two h w -> b two h w", b=batch)
        for block in self.blocks:
            x = block(x, places, condition.labels, features)
        logits = self.output(F.elu(self.output_blocks(x)))
        return rearrange(logits, "b k h w -> b (h w) k")

    def stepper(self, batch: int, condition: Condition) -> PixelSNAILStepper:
        return PixelSNAILStepper(self, batch, condition)


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
        self.queries = [StepQuery(block, raw, activated, dtype) for block in blocks]
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


class StepQuery:
    """A block's weights for what is done at a position itself: to ask, and to take in the answer."""

    def __init__(self, block: Block, raw: Tensor, activated: Tensor, dtype: torch.dtype):
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
        self.second, self.second_bias = matrix(second).to(dtype), bias_of(second).to(dtype)
        self.query = (matrix(query) * scale).to(dtype)
        self.near_query = self.query[:width]
        self.query_bias = ((bias_of(query) + raw @ matrix(query)[width:]) * scale).to(dtype).unsqueeze(1).unbind()
        self.side = matrix(side).to(dtype)
        self.out, self.out_bias = matrix(out.second).to(dtype), bias_of(out.second).to(dtype)

    def __call__(self, near: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """near: b d; keys, values: (b heads) n d, of the positions before -> b d."""
        query_hidden, hidden = torch.addmm(self.first_bias[position], F.elu(near), self.first).chunk(2, dim=1)
        gated = F.glu(torch.addmm(self.second_bias, F.elu(query_hidden), self.second), dim=1)
        query = torch.addmm(self.query_bias[position], near, self.near_query).addmm_(gated, self.query)
        scores = torch.bmm(query.view(len(keys), 1, -1), keys.mT)
        attended = torch.bmm(scores.softmax(dim=-1), values).view(len(near), -1)
        hidden = torch.addmm(hidden, F.elu(attended, inplace=True), self.side)
        return near + F.glu(torch.addmm(self.out_bias, F.elu(hidden, inplace=True), self.out), dim=1)


class StepResidual:
    """A residual block of 1x1 convolutions: b d -> b d."""

    def __init__(self, block: GatedResidual, dtype: torch.dtype):
        self.first, self.second = (matrix(one).to(dtype) for one in (block.first, block.second))
        self.first_bias, self.second_bias = (bias_of(one).to(dtype) for one in (block.first, block.second))

    def __call__(self, x: Tensor) -> Tensor:
        hidden = F.elu(torch.addmm(self.first_bias, F.elu(x), self.first), inplace=True)
        return x + F.glu(torch.addmm(self.second_bias, hidden, self.second), dim=1)


def stamps(prior: PixelSNAIL) -> Tensor:
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
    def __init__(self, prior: PixelSNAIL, batch: int, condition: Condition):
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
        self.output_blocks = [StepResidual(cast(GatedResidual, block), dtype) for block in prior.output_blocks]
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
