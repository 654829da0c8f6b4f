"""The exact walk of `Transformer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codes.spec import Grid
from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.priors.bitwise import OfBits
from stage2_prior.priors.prefix import Prefix
from stage2_prior.priors.transformer import Transformer
from stage2_prior.priors.transformer_layers import Block, RMSNorm


class ExactTransformer:
    """A `Stepper` of float64 logits that are the same on every machine. The places before the codes, class and prefix,
    are walked one by one, as the codes are."""

    @torch.inference_mode()
    def __init__(self, prior: Transformer, batch: int, condition: Condition):
        config, device = prior.config, prior.classes.weight.device
        prior.check(batch, condition)
        condition = condition.to(device)
        self.embedding, self.first_numbers = weight_of(prior.embedding), prior.first_numbers()
        self.next_grid = None if prior.next_grid is None else prior.next_grid.weight.double()
        self.grid_at = [number for number, size in enumerate(prior.sizes) for _ in range(size)]
        # Turns of the keys of each place, prefix included, and of its query, which stands at the place after it.
        turns = place_turns((*prior.given, *prior.code_spec.grids), config.head_width, device)
        unturned = prior.prefix.text_length + prior.prefix.embeddings_length
        self.turns = [
            F.pad(part, (0, 0, unturned, 0), value=value) for part, value in zip(turns, (1.0, 0.0), strict=True)
        ]
        places = len(self.turns[0]) - 1
        self.blocks = [ExactBlock(block, batch, places) for block in cast("list[Block]", prior.blocks)]
        self.gain = prior.norm.gain.double()
        self.outputs = [Product(part) for part in weight_of(prior.output).split(prior.vocabularies)]
        self.place = self.position = 0  # in the whole sequence, and among the codes
        classes = prior.classes.weight.double()
        self.before = classes[-1:].expand(batch, -1) if condition.labels is None else classes[condition.labels]
        if prior.prefix.length:
            *first, self.before = [self.before, *prefix(prior.prefix, condition).unbind(1)]
            for x in first:
                self.through(x)

    def through(self, x: Tensor) -> Tensor:
        """x, b d, at the next place, through all blocks."""
        turns = [part[self.place : self.place + 2] for part in self.turns]
        for block in self.blocks:
            x = block(x, *turns)
        self.place += 1
        return x

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        x = self.before
        if previous is not None:
            x = self.embedding[previous[:, 0] + self.first_numbers[self.grid_at[self.position - 1]]]
        grid = self.grid_at[self.position]
        if self.next_grid is not None:
            x = x + self.next_grid[grid]
        self.position += 1
        states = exact.rms_norm(self.through(x), RMSNorm.epsilon).mul_(self.gain)
        return self.outputs[grid](states)[:, None]


def weight_of(module: nn.Module) -> Tensor:
    """In float64."""
    if isinstance(module, OfBits):
        return module.table(torch.float64)
    return cast("nn.Embedding | nn.Linear", module).weight.double()


class ExactBlock:
    """A block, with the keys and values of the places so far."""

    def __init__(self, block: Block, batch: int, places: int):
        attention, feed_forward = block.attention, block.feed_forward
        heads, shared, _ = attention.split
        width = attention.out.in_features // heads
        device = attention.out.weight.device
        self.shape = (batch, heads + 2 * shared, width)
        self.heads, self.shared, self.scale = heads, shared, 1 / math.sqrt(width)
        self.gains = block.attention_norm.gain.double(), block.feed_forward_norm.gain.double()
        self.qkv, self.out = Product.of(attention.qkv), Product.of(attention.out)
        self.gate_up, self.down = Product.of(feed_forward.gate_up), Product.of(feed_forward.down)
        self.attention = exact.Attention(batch * shared, places, width, device)

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x: b d; cosine, sine: 2 d/2, of the turns of the key and of the query."""
        heads, shared = self.heads, self.shared
        qkv = self.qkv(exact.rms_norm(x, RMSNorm.epsilon).mul_(self.gains[0])).view(self.shape)
        queries = turned(qkv[:, :heads], cosine[1], sine[1]).mul_(self.scale)
        keys = turned(qkv[:, heads : heads + shared], cosine[0], sine[0])
        self.attention.add(keys.reshape(-1, 1, keys.shape[-1]), qkv[:, heads + shared :].reshape(-1, 1, keys.shape[-1]))
        # The heads that share keys are queries of one row.
        attended = self.attention(queries.view(len(keys) * shared, -1, keys.shape[-1]))
        x = x + self.out(attended.view(len(x), -1))
        gate, up = self.gate_up(exact.rms_norm(x, RMSNorm.epsilon).mul_(self.gains[1])).chunk(2, dim=-1)
        return x + self.down(exact.silu(gate).mul_(up))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`... d` with each pair of neighbours turned by an angle, d/2."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)


def place_turns(grids: Sequence[Grid], head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `transformer.place_angles`, `n+1 head_width/2`."""
    pairs = head_width // 4
    frequencies = [exact.power(100.0, -pair / pairs) for pair in range(pairs)]
    height, width = max(grid.height for grid in grids), max(grid.width for grid in grids)
    angles = [[0.0] * (2 * pairs)]
    for grid in grids:
        for row in range(grid.height):
            at_row = [((row + 0.5) * (height / grid.height) - 0.5) * frequency for frequency in frequencies]
            for column in range(grid.width):
                at = (column + 0.5) * (width / grid.width) - 0.5
                angles.append([*at_row, *(at * frequency for frequency in frequencies)])
    return exact.cosine_and_sine(angles, device)


def prefix(module: Prefix, condition: Condition) -> Tensor:
    """What `module` makes of a condition, `b length d`."""
    parts = []
    if condition.text is not None:
        tokens = module.text.weight.double()[condition.text.clamp(min=0)] + module.text_positions.double()
        parts.append(torch.where((condition.text < 0)[..., None], module.text_ended.double(), tokens))
    if condition.embeddings is not None and condition.embedding_mask is not None:
        vectors = Product.of(module.projection)(condition.embeddings.double())
        parts.append(torch.where(condition.embedding_mask[..., None], vectors, module.embeddings_ended.double()))
    for first, grid in zip(module.first_given, condition.codes or (), strict=True):
        parts.append(module.given.weight.double()[grid.flatten(1) + first])
    return torch.cat(parts, dim=1)
