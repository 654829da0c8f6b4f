"""The blocks of today's language models over the places of an image: RMSNorm, rotary positions of rows and columns,
SwiGLU; and their weights as sampling wants them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from codes.spec import Grid
from common.errors import UserError
from stage2_prior.decoding.engine import (
    BlockWeights,
    Product,
    Room,
    Weights,
    blocks_of,
    blocks_of_heads,
    norm_of,
    turn_table,
)


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
    bitwise: bool = False  # embeds and tells each bit of a code by itself: for one grid of 2^d codes, such as of LFQ
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
        if self.bitwise and self.tied:
            raise UserError("tied and bitwise, expected one of them: bits have vectors of their own at both ends")
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
    """x / (rms(x) + epsilon) * gain over the last axis, the root mean square at least in float32."""

    epsilon = 1e-6

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.gain, self.epsilon)
        dtype = torch.promote_types(x.dtype, torch.float32)
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) / math.sqrt(x.shape[-1])
        return (x / (rms + self.epsilon)).to(x.dtype) * self.gain


class _RMSNorm(torch.autograd.Function):
    """In float32, with half the passes of the same backward made of single operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = 1 / (norm / math.sqrt(x.shape[-1]) + epsilon)
        ctx.save_for_backward(x, gain, norm, scale)
        return (x * scale).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, norm, scale = ctx.saved_tensors
        rows, scales, given = x.flatten(0, -2), scale.flatten(), gradient.flatten(0, -2)
        products = given * rows
        of_gain = scales @ products
        # The scale falls as the norm grows; at 0 nothing has a direction.
        norms = norm.flatten().clamp(min=torch.finfo(norm.dtype).tiny) * math.sqrt(x.shape[-1])
        falls = scales.square() * (products @ gain) / norms
        of_x = torch.mul(given, gain, out=products).mul_(scales[:, None]).addcmul_(rows, falls[:, None], value=-1)
        return of_x.view_as(x), of_gain, None


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
    """`x` (b heads n d) with each pair of neighbours along d turned by the angle (n d/2), in float32."""
    if torch.compiler.is_compiling():  # which knows no complex numbers
        first, second = rearrange(x.float(), "b heads n (d pair) -> pair b heads n d", pair=2)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
        return turned.flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


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
        by_head = self.qkv(x).unflatten(-1, (sum(self.split), -1))
        q, k, v = (part.transpose(1, 2) for part in by_head.split(self.split, dim=2))
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
    ):
        """gain: of the last norm; outputs: k d, each; angles: `places+1 d/2`, see `place_angles`."""
        self.root = math.sqrt(config.width)
        self.epsilon = gain.new_full((), RMSNorm.epsilon * self.root, dtype=torch.float32)  # a number would be copied
        turns = torch.polar(torch.ones_like(angles), angles)
        self.weights = Weights(
            blocks=[self.block(block, config, dtype) for block in cast("Iterable[Block]", blocks)],
            width=config.width,
            heads=config.heads,
            shared=config.shared_heads,
            normalise=self.divided,
            gated=True,
            turns=turn_table(turns[1:], turns[:-1], config.heads, config.shared_heads),
        )
        self.outputs = [Product(output.float() * gain * self.root, None, dtype) for output in outputs]

    def block(self, block: Block, config: TransformerConfig, dtype: torch.dtype) -> BlockWeights:
        # Folded in float32, so that weights in bfloat16 are rounded once.
        qkv = block.attention.qkv.weight.float() * block.attention_norm.gain * self.root
        qkv[: config.width] /= math.sqrt(config.head_width)
        gate_up = block.feed_forward.gate_up.weight.float() * block.feed_forward_norm.gain * self.root
        return BlockWeights(
            qkv=Product(qkv, None, dtype, blocks_of_heads(sum(block.attention.split), config.head_width, dtype)),
            out=Product(block.attention.out.weight, None, dtype),
            up=Product(gate_up, None, dtype, 2 * blocks_of(config.hidden_width, dtype)),
            down=Product(block.feed_forward.down.weight, None, dtype),
        )

    def divided(self, room: Room) -> None:
        """RMSNorm, but for what the weights hold of it."""
        torch.div(room.stream, norm_of(room.stream).add_(self.epsilon), out=room.rows_like_stream)
