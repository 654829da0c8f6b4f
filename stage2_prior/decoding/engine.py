"""Transformer blocks over a few places at a time: one of each sample, or a window of them, after those before.

Keys and values of all places stand in a cache that is allocated once and written in place. A matrix lies as the device
wants it (`Product`), with the gain of the norm before it and the scale of the attention scores folded in, and is made
once for each model (`prepared`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.decoding.column_blocks import in_blocks, join
from stage2_prior.decoding.prepared import for_a_single_row

BLOCK_COLUMNS = 32  # at least, of a matrix on a CPU
BLOCK_BYTES = 64  # at least, of a row of a block that a single row is multiplied with: a line of the cache


def blocks_of(columns: int, dtype: torch.dtype) -> int:
    """Into how many blocks of columns a matrix of so many is cut on a CPU: the narrowest that are wide enough."""
    least = BLOCK_BYTES // dtype.itemsize if for_a_single_row() else BLOCK_COLUMNS
    return next(columns // width for width in range(min(least, columns), columns + 1) if columns % width == 0)


def blocks_of_heads(heads: int, width: int, dtype: torch.dtype) -> int:
    """Likewise of one that makes so many heads of some width: one for each head, or for parts of it."""
    return heads * (blocks_of(width, dtype) if for_a_single_row() else 1)


class Product:
    """A linear layer over a few rows: `r in` -> `blocks r out/blocks`, or `r out` where the matrix is one block.

    On a CPU a product with few rows takes as long as the matrix takes to be read. BLAS libraries stride through it, on
    one thread; narrow blocks that lie one after the other are read from end to end, and of a batch of them each thread
    takes whole ones. With one row that is twice as fast, and with blocks of 16 columns as fast as memory is read; more
    rows want wider ones. A GPU is better off with one matrix."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, blocks: int | None = None):
        """weight: out in, as nn.Linear keeps it; blocks: on a CPU, a number that divides out; None: `blocks_of` it."""
        self.blocks = 1 if weight.device.type != "cpu" else blocks or blocks_of(len(weight), dtype)
        self.columns = len(weight) // self.blocks
        matrix = weight.to(dtype).unflatten(0, (self.blocks, -1)).transpose(1, 2)
        self.matrix = (matrix if self.blocks > 1 else matrix[0]).contiguous()
        self.bias: Tensor | None = None
        if bias is not None:
            self.bias = bias.to(dtype).view(self.blocks, 1, -1) if self.blocks > 1 else bias.to(dtype)

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.columns) if self.blocks == 1 else (self.blocks, rows, self.columns)

    def factor(self, rows: Tensor) -> Tensor:
        """Rows, `r in`, as the product takes them: a view."""
        return rows if self.blocks == 1 else rows.expand(self.blocks, -1, -1)

    def __call__(self, factor: Tensor, out: Tensor | None = None) -> Tensor:
        """The product, written to `out` where given."""
        if self.bias is None:
            return (torch.mm if self.blocks == 1 else torch.bmm)(factor, self.matrix, out=out)
        return (torch.addmm if self.blocks == 1 else torch.baddbmm)(self.bias, factor, self.matrix, out=out)

    def add_to(self, total: Tensor, factor: Tensor) -> None:
        """Adds the product to `total` in place."""
        if self.blocks == 1:
            total.addmm_(factor, self.matrix)
        else:
            total.baddbmm_(factor, self.matrix)
        if self.bias is not None:
            total.add_(self.bias)

    def joined(self, rows: Tensor) -> Tensor:
        """The product of rows as rows, `r out`."""
        product = self(self.factor(rows))
        return product if self.blocks == 1 else join(product)


@dataclass(frozen=True)
class BlockWeights:
    qkv: Product  # in one block, or `blocks_of_heads`: those of the queries, of the keys, of the values
    out: Product
    up: Product  # of a gated feed-forward the gates, then what they open
    down: Product


@dataclass(frozen=True)
class Weights:
    """Blocks that look alike, made once for each model."""

    blocks: Sequence[BlockWeights]
    width: int  # d
    heads: int
    shared: int  # heads of keys and values
    normalise: Callable[[Room], None]  # the room's stream into its rows, but for what the weights hold of the norm
    gated: bool  # SwiGLU; else GELU
    turns: Tensor | None  # of `turn_table`; None: nothing is turned

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def norm_of(stream: Tensor) -> Tensor:
    """Of each row of a residual stream, at least float32, with the stream's axes."""
    axes = 1 if stream.dim() == 2 else (0, 2)
    dtype = torch.float32 if stream.dtype.itemsize < 4 else None  # even the same type would be copied to
    return torch.linalg.vector_norm(stream, dim=axes, keepdim=True, dtype=dtype)


def turn_table(query: Tensor, key: Tensor, heads: int, shared: int) -> Tensor:
    """By which the pairs of each head are turned at each place, complex `places+1 heads+shared 1 d_head/2`: all heads
    of queries, then those of keys. query, key: of one head, `places d_head/2`."""
    table = torch.cat([query[:, None].expand(-1, heads, -1), key[:, None].expand(-1, shared, -1)], dim=1)
    beyond = table.new_zeros(1, *table.shape[1:])  # a window may ask beyond the last place
    return torch.cat([table, beyond])[:, :, None]


class Room:
    """What `places` places of each sample are worked in, allocated once with every view that it takes."""

    def __init__(self, weights: Weights, batch: int, places: int, like: Tensor):
        rows, heads, shared, block = batch * places, weights.heads, weights.shared, weights.blocks[0]
        group = heads // shared
        self.stream = like.new_empty(block.out.shape(rows))  # the residual stream, to which products are added
        self.rows = like.new_empty(rows, weights.width)  # what products read of it
        self.rows_like_stream = self.rows if self.stream.dim() == 2 else in_blocks(self.rows, len(self.stream))
        self.to_project, self.to_open = block.qkv.factor(self.rows), block.up.factor(self.rows)
        self.projected = like.new_empty(block.qkv.shape(rows))
        by_head = self._by_head(weights, block.qkv.columns, rows)  # heads r d, float32
        self.pairs = as_pairs(by_head[: heads + shared])
        self.key_value = by_head[heads:].view(2, shared, batch, places, -1)
        # The heads that share keys are rows of one product with them: as they are projected, or copied there.
        self.query_by_head = by_head[:heads].view(shared, group, batch, places, -1)
        self.query_in_place = like.dtype == torch.float32 and by_head.is_contiguous() and 1 in (group, batch)
        if self.query_in_place:
            self.query = by_head[:heads].view(shared * batch, group * places, -1)
        else:
            self.query = like.new_empty(shared * batch, group * places, weights.head_width)
        self.query_rows = self.query.view(shared, batch, group, places, -1).transpose(1, 2)
        self.attended = torch.empty_like(self.query)
        by_row = self.attended.view(shared, batch, group, places, -1).permute(1, 3, 0, 2, 4)  # b m shared group d
        # One row is a view. Of more, room of their own: that of a single head would be a view too, onto which PyTorch
        # does not copy itself.
        self.attended_rows = by_row.reshape(self.rows.shape) if rows == 1 else torch.empty_like(self.rows)
        self.attended_to_copy = None if rows == 1 else (self.attended_rows.view(by_row.shape), by_row)
        self.to_add = block.out.factor(self.attended_rows)
        self.opened = like.new_empty(block.up.shape(rows))
        self.hidden = like.new_empty(rows, block.up.blocks * block.up.columns // (2 if weights.gated else 1))
        halves = self.opened.chunk(2, dim=0 if self.opened.dim() == 3 else 1) if weights.gated else (self.opened,)
        self.gate, self.up = halves[0], halves[-1]
        self.to_close = block.down.factor(self.hidden)
        self.hidden_in_blocks = self.hidden if self.gate.dim() == 2 else in_blocks(self.hidden, len(self.gate))

        # What is added to the scores of places that follow each other: -inf for those after a row's own; 1 rows places.
        self.later = like.new_full((1, places, places), -math.inf).triu_(1).repeat(1, group, 1)

    def _by_head(self, weights: Weights, columns: int, rows: int) -> Tensor:
        """Queries, keys and values, `heads r d` in float32: what was projected, or what it is copied to."""
        heads, width = weights.heads + 2 * weights.shared, weights.head_width
        parts = max(1, width // columns)  # blocks that a head comes in
        blocks = self.projected.view(-1, rows, columns)
        if parts > 1:
            in_parts = blocks.unflatten(0, (heads, parts)).transpose(1, 2)  # heads r parts d/parts
        else:
            in_parts = blocks.unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1)[:, :, None]
        self.to_copy: tuple[Tensor, Tensor] | None = None  # where to, and what
        if self.projected.dtype == torch.float32 and 1 in (parts, rows):
            return in_parts.view(heads, rows, width)
        by_head = torch.empty(heads, rows, width, device=self.projected.device)
        self.to_copy = by_head.view(in_parts.shape), in_parts
        return by_head

    def enter(self, x: Tensor) -> None:
        """x: `r d`, the embedded tokens."""
        self.stream.copy_(x if self.stream.dim() == 2 else in_blocks(x, len(self.stream)))


class Decoder:
    """A stack of blocks on its way through a batch: the keys and values of the places so far."""

    def __init__(self, weights: Weights, batch: int, places: int, dtype: torch.dtype, device: torch.device):
        self.weights, self.batch, self.places = weights, batch, places
        sizes = (len(weights.blocks), 2, weights.shared, batch, places + 1, weights.head_width)
        # One place more than there are, for what a window asks beyond the last.
        self.cache = torch.empty(sizes, dtype=dtype, device=device)  # layers (keys, values) heads b n d
        self.written = 0  # places in the cache, of all samples
        self.all_written = False
        self.rooms: dict[int, Room] = {}

    def room(self, places: int) -> Room:
        if places not in self.rooms:
            self.rooms[places] = Room(self.weights, self.batch, places, self.cache)
        return self.rooms[places]

    def step(self, x: Tensor, place: int, hidden: Tensor | None = None) -> Tensor:
        """The normed result `b d` at the same place of each sample, but for what the weights behind it hold of the
        norm; x: b d. hidden: bool `b place+1`, True for a place that is not seen. The result is overwritten by the
        next call."""
        room = self.room(1)
        room.enter(x)
        self.written = max(self.written, place + 1)
        here = self.cache[..., place : place + 1, :].unbind()
        known = self._known(place + 1)
        mask = None if hidden is None else self._mask(hidden[:, None])
        turns = None if self.weights.turns is None else self.weights.turns[place]
        for block, slot, keys, values in zip(self.weights.blocks, here, *known, strict=True):
            self._project(room, block, turns)
            slot.copy_(room.key_value)
            self._finish(room, block, keys, values, mask)
        self.weights.normalise(room)
        return room.rows

    def read(self, x: Tensor, hidden: Tensor | None = None) -> None:
        """Fills the cache with the first places, x: b p d, in one pass. hidden: bool `b p p` or `1 p p`, True where the
        row's place does not see the column's; None for those after it."""
        self.written = places = x.shape[1]
        room = Room(self.weights, self.batch, places, self.cache)
        room.enter(x.flatten(0, 1))
        if hidden is None:
            hidden = torch.ones(1, places, places, dtype=torch.bool, device=x.device).triu_(1)
        mask, turns = self._mask(hidden), self._turns(torch.arange(places, device=x.device).repeat(self.batch))
        here, known = self.cache[..., :places, :].unbind(), self._known(places)
        for block, slot, keys, values in zip(self.weights.blocks, here, *known, strict=True):
            self._project(room, block, turns)
            slot.copy_(room.key_value)
            self._finish(room, block, keys, values, mask)

    def window(self, x: Tensor, first: Tensor, hidden: Tensor | None = None, turned_as: Tensor | None = None) -> Tensor:
        """As `step`, at w places of each sample from `first` on, int64 `b`: x: b w d -> b w d. hidden: bool `b n`, True
        for a place that is seen by none but itself. turned_as: int64 `b w`, the rows of the table of turns; None: those
        of the places. Places beyond the last are worked out at random."""
        width = x.shape[1]
        if hidden is None and first.device.type == "cpu":
            of_samples = first.tolist()
            if min(of_samples) == max(of_samples) <= self.places - width:
                return self._window_of_all(x, of_samples[0], turned_as)
        if not self.all_written:  # of a place that is not seen a share of 0 is taken, which of a nan would be nan
            self.cache[..., self.written :, :] = 0
            self.all_written = True
        room = self.room(width)
        room.enter(x.flatten(0, 1))
        at = (first[:, None] + torch.arange(width, device=first.device)).clamp(max=self.places)  # b w
        # Only a CPU knows the places without a wait.
        end = min(int(first.max()) + width, self.places) if first.device.type == "cpu" else self.places
        places = torch.arange(end, device=first.device)
        unseen = places > at[..., None]  # b w n
        if hidden is not None:
            unseen |= hidden[:, None, :end] & (places != at[..., None])
        mask, turns = self._mask(unseen), self._turns((at if turned_as is None else turned_as).flatten())
        known = self._known(end)
        slots, length = self.cache.flatten(1, 4).unbind(), self.cache.shape[4]
        samples = torch.arange(2 * self.weights.shared * self.batch, device=first.device) * length
        indices = (samples.view(-1, self.batch, 1) + at).flatten()  # of two heads b w among the cache's rows
        for block, slot, keys, values in zip(self.weights.blocks, slots, *known, strict=True):
            self._project(room, block, turns)
            slot.index_copy_(0, indices, room.key_value.to(slot.dtype).flatten(0, 3))
            self._finish(room, block, keys, values, mask)
        self.weights.normalise(room)
        return room.rows.view_as(x)

    def _window_of_all(self, x: Tensor, place: int, turned_as: Tensor | None) -> Tensor:
        """`window` at the same places of all samples: they lie beside each other in the cache, and nothing but they is
        masked."""
        width = x.shape[1]
        room, end = self.room(width), place + width
        room.enter(x.flatten(0, 1))
        self.written = max(self.written, end)
        turns = None
        if turned_as is not None:
            turns = self._turns(turned_as.flatten())
        elif self.weights.turns is not None:
            turns = self.weights.turns[place:end, :, 0].transpose(0, 1)
            turns = turns if self.batch == 1 else turns.repeat(1, self.batch, 1)
        here, known = self.cache[..., place:end, :].unbind(), self._known(end)
        for block, slot, keys, values in zip(self.weights.blocks, here, *known, strict=True):
            self._project(room, block, turns)
            slot.copy_(room.key_value)
            self._finish(room, block, keys, values, room.later)
        self.weights.normalise(room)
        return room.rows.view_as(x)

    def _known(self, places: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys, `(heads b) d n`, and values, `(heads b) n d`, of the first places in each layer."""
        keys, values = self.cache[..., :places, :].flatten(2, 3).unbind(1)
        return keys.mT.unbind(), values.unbind()

    def _mask(self, hidden: Tensor) -> Tensor:
        """What is added to the scores, `heads b rows n`, for `b m n`."""
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=hidden.device)
        mask.masked_fill_(hidden, -math.inf)
        return mask.repeat(1, self.weights.heads // self.weights.shared, 1)

    def _turns(self, at: Tensor) -> Tensor | None:
        """Of rows at these places: `heads r d/2`."""
        return None if self.weights.turns is None else self.weights.turns[at, :, 0].transpose(0, 1)

    def _project(self, room: Room, block: BlockWeights, turns: Tensor | None) -> None:
        self.weights.normalise(room)
        block.qkv(room.to_project, out=room.projected)
        if room.to_copy is not None:
            by_head, projected = room.to_copy
            by_head.copy_(projected)
        if turns is not None:
            room.pairs.mul_(turns)
        if not room.query_in_place:
            room.query_rows.copy_(room.query_by_head)

    def _finish(self, room: Room, block: BlockWeights, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """keys, values: see `_known`."""
        scores = torch.bmm(room.query, keys)
        if mask is not None:  # of the last places, which may be all
            scores.view(-1, len(mask), *scores.shape[1:])[..., -mask.shape[-1] :].add_(mask)
        torch.bmm(scores.softmax(dim=-1), values, out=room.attended)
        if room.attended_to_copy is not None:
            by_row, attended = room.attended_to_copy
            by_row.copy_(attended)
        block.out.add_to(room.stream, room.to_add)
        self.weights.normalise(room)
        block.up(room.to_open, out=room.opened)
        if self.weights.gated:
            torch.mul(F.silu(room.gate, inplace=True), room.up, out=room.hidden_in_blocks)
        else:
            room.hidden_in_blocks.copy_(F.gelu(room.opened))
        block.down.add_to(room.stream, room.to_close)


def as_pairs(x: Tensor) -> Tensor:
    """`... d` as complex `... d/2`, a view: a turn of each pair is then one multiplication."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
