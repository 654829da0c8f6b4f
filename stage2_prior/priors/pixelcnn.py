"""Gated PixelCNN of van den Oord et al. 2016 (arXiv:1606.05328), over one grid of codes, in raster order.

Two stacks of convolutions see all codes before a position and none after it, without a blind spot. The vertical stack
sees the rows above, the horizontal stack what is left of the position in its own row:

    v v v v v
    v v v v v
    h h .          . = the code to be predicted

Where the paper masks its kernels, here the input is moved once, down for the vertical stack and right for the
horizontal one; kernels then end at the current row and column, and no multiplication is wasted on a mask.

Classes shift the gates of every layer, as in the paper, and given codes shift them place by place.
"""

from __future__ import annotations

import copy
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
from stage2_prior.decoding.column_blocks import ColumnBlocks, in_blocks, join
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.given_codes import GivenCodes
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig:
    kind: Literal["pixelcnn"] = "pixelcnn"
    layers: int = 12
    width: int = 128  # d, channels of both stacks
    first_kernel_size: int = 7  # of the first layer, which sees the embedded codes
    kernel_size: int = 3  # of all other layers
    dropout: float = 0.0  # of what a layer adds to the horizontal stack
    output_width: int = 512  # channels between the horizontal stack and the logits
    given_blocks: int = 3  # residual blocks over each grid of given codes; without given codes it means nothing
    given_width: int = 64  # channels of each given grid's features

    def __post_init__(self) -> None:
        for name in ("layers", "width", "output_width", "given_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.given_blocks < 0:
            raise UserError(f"given_blocks={self.given_blocks}, expected 0 or more")
        for name in ("first_kernel_size", "kernel_size"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise UserError(f"{name}={getattr(self, name)}, expected an odd number of at least 3")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}, expected a share from 0 to below 1")


def gate(x: Tensor, dim: int) -> Tensor:
    """tanh of one half times sigmoid of the other (equation 2)."""
    signal, opening = x.chunk(2, dim=dim)
    return signal.tanh() * opening.sigmoid()


class Layer(nn.Module):
    """One layer of both stacks (figure 2): b d h w -> b d h w, twice."""

    def __init__(
        self, width: int, kernel_size: int, num_classes: int, given_width: int, dropout: float, residual: bool
    ):
        super().__init__()
        reach = kernel_size // 2  # rows above, and columns to either side
        self.reach = reach
        self.residual = residual
        self.vertical = nn.Conv2d(width, 2 * width, (reach + 1, kernel_size), bias=False)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, reach + 1), bias=False)
        self.out = nn.Conv2d(width, width, 1, bias=False)
        self.class_bias = nn.Embedding(num_classes + 1, 4 * width)  # of both gates; the last one is the null label
        nn.init.zeros_(self.class_bias.weight)
        self.given_bias = nn.Conv2d(given_width, 4 * width, 1, bias=False) if given_width else None
        self.dropout = nn.Dropout(dropout)

    def biases(self, labels: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the vertical and the horizontal gate, each `b 2d 1 1`, or `b 2d h w` with features of given codes."""
        bias = rearrange(self.class_bias(labels), "b d -> b d 1 1")
        if self.given_bias is not None:
            bias = bias + self.given_bias(features)
        vertical, horizontal = bias.chunk(2, dim=1)
        return vertical, horizontal

    def forward(
        self, vertical: Tensor, horizontal: Tensor, labels: Tensor, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        vertical_bias, horizontal_bias = self.biases(labels, features)
        above = self.vertical(F.pad(vertical, (self.reach, self.reach, self.reach, 0)))
        left = self.horizontal(F.pad(horizontal, (self.reach, 0, 0, 0)))
        gated = gate(left + self.vertical_to_horizontal(above) + horizontal_bias, dim=1)
        new = self.dropout(self.out(gated))
        return gate(above + vertical_bias, dim=1), horizontal + new if self.residual else new


class PixelCNN(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid, or when given codes do not fit it; see `GivenCodes`."""

    kind = "pixelcnn"
    config_class = PixelCNNConfig
    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid = self.only_grid()
        self.embedding = nn.Embedding(self.grid.vocabulary, config.width)
        self.given_codes: GivenCodes | None = None
        if self.given:
            self.given_codes = GivenCodes(
                self.given, self.grid, config.given_width, config.given_blocks, dropout=config.dropout
            )
        self.layers = nn.ModuleList(
            Layer(
                config.width,
                config.first_kernel_size if index == 0 else config.kernel_size,
                num_classes,
                0 if self.given_codes is None else self.given_codes.width,
                config.dropout,
                residual=index > 0,  # the first layer's input is the code itself, not a feature to be refined
            )
            for index in range(config.layers)
        )
        self.output_hidden = nn.Conv2d(config.width, config.output_width, 1)
        self.output = nn.Conv2d(config.output_width, self.grid.vocabulary, 1)

    def labels(self, batch: int, condition: Condition) -> Tensor:
        """The labels `b`, the null label where the prior has no classes."""
        if condition.labels is None:
            return torch.full((batch,), self.num_classes, device=self.embedding.weight.device)
        return condition.labels

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        labels = self.labels(len(self.sequence(codes, condition)), condition)
        features = None if self.given_codes is None else self.given_codes(cast(Codes, condition.codes))
        embedded = rearrange(self.embedding(codes[0]), "b h w d -> b d h w")
        vertical = F.pad(embedded, (0, 0, 1, -1))  # moved down by a row
        horizontal = F.pad(embedded, (1, -1))  # moved right by a column
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, labels, features)
        logits = self.output(self.output_hidden(horizontal.relu()).relu())
        return rearrange(logits, "b k h w -> b (h w) k")

    def stepper(self, batch: int, condition: Condition) -> PixelCNNStepper:
        return PixelCNNStepper(self, batch, condition)


class StepLayer:
    """One layer on its way through the image: the rows that the vertical stack still needs, what it has told the
    horizontal stack about this row, and this row of the horizontal stack so far.

    The views of its buffers are made once: at every step they would cost as much as the arithmetic.
    """

    def __init__(self, layer: Layer, labels: Tensor, columns: int, dtype: torch.dtype):
        batch, width = len(labels), layer.out.in_channels
        blocks = math.gcd(4, width)
        self.reach = layer.reach
        self.residual = layer.residual
        self.vertical = rearrange(layer.vertical.weight.to(dtype), "out d row tap -> (row tap d) out").contiguous()
        self.vertical_to_horizontal = layer.vertical_to_horizontal.weight.flatten(1).to(dtype).t().contiguous()  # 2d 2d
        horizontal = rearrange(layer.horizontal.weight, "out d 1 tap -> out (tap d)")
        self.horizontal = ColumnBlocks(horizontal, 2 * blocks, dtype).blocks
        self.out = layer.out.weight.flatten(1).to(dtype).t()  # d d
        self.bias = layer.class_bias(labels).to(dtype)[:, None]  # b 1 4d
        self.given_bias = None if layer.given_bias is None else layer.given_bias.weight.flatten(1).to(dtype)
        self.rows = self.out.new_zeros(batch, layer.reach + 1, columns + 2 * layer.reach, width)
        # Of each position what its kernel sees, a view: b columns row tap d
        self.seen = self.rows.unfold(2, 2 * layer.reach + 1, 1).permute(0, 2, 1, 4, 3)
        self.from_above = self.out.new_zeros(columns, 2 * blocks, batch, width // blocks)
        self.gates = self.out.new_empty(2 * blocks, batch, width // blocks)
        self.signals, self.openings = self.gates.split(blocks)
        self.gated = self.out.new_empty(batch, width)
        self.gated_blocks = in_blocks(self.gated, blocks)  # the same, as the gates lie
        left = self.out.new_zeros(batch, (layer.reach + columns) * width)  # b (column d)
        self.inputs = left.split(width, dim=1)[layer.reach :]  # b d, of each column: to be written before its step
        self.taps = [  # of each column: 2blocks b (tap d)
            left.narrow(1, column * width, (layer.reach + 1) * width).expand(2 * blocks, -1, -1)
            for column in range(columns)
        ]
        self.plus = self.from_above.unbind()

    def begin_row(self, row: Tensor, features: Tensor | None) -> Tensor:
        """The vertical stack for a whole row, `b w d` -> `b w d`. features: of given codes in this row, `b w c`.

        As one product of matrices: a convolution over so few rows takes twice as long on the CPU."""
        bias = self.bias if self.given_bias is None else self.bias + F.linear(cast(Tensor, features), self.given_bias)
        vertical_bias, horizontal_bias = bias.chunk(2, dim=2)
        self.rows[:, :-1] = self.rows[:, 1:].clone()
        self.rows[:, -1, self.reach : -self.reach] = row
        above = self.seen.flatten(2) @ self.vertical  # b w 2d
        to_horizontal = above @ self.vertical_to_horizontal + horizontal_bias
        blocks = self.from_above.shape[1]
        self.from_above.copy_(rearrange(to_horizontal, "b w (blocks d) -> w blocks b d", blocks=blocks))
        return gate(above + vertical_bias, dim=2)

    def step(self, column: int, output: Tensor) -> None:
        """The horizontal stack at one column, from `inputs[column]` to `output`, both `b d`."""
        torch.baddbmm(self.plus[column], self.taps[column], self.horizontal, out=self.gates)
        torch.mul(self.signals.tanh_(), self.openings.sigmoid_(), out=self.gated_blocks)  # `gate`
        if self.residual:
            torch.addmm(self.inputs[column], self.gated, self.out, out=output)
        else:
            torch.mm(self.gated, self.out, out=output)


class PixelCNNStepper:
    """One position of the PixelCNN per call. The vertical stack runs a row at a time, as soon as the row above is
    known; the horizontal stack one position at a time, from cached inputs. Each feature is computed once, so a whole
    image takes the arithmetic of one full pass."""

    @torch.inference_mode()
    def __init__(self, prior: PixelCNN, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, dtype = prior.embedding.weight.device, step_dtype(prior.embedding.weight)
        condition = condition.to(device)
        labels = prior.labels(batch, condition)
        self.features: list[Tensor | None] = [None] * prior.grid.height  # of given codes, b w c of each row
        if prior.given_codes is not None:
            given_codes = copy.deepcopy(prior.given_codes).eval()  # without dropout, and the prior stays as it is
            self.features = list(rearrange(given_codes(cast(Codes, condition.codes)).to(dtype), "b c h w -> h b w c"))
        self.columns = prior.grid.width
        self.embedding = prior.embedding.weight.to(dtype)
        self.layers = [StepLayer(layer, labels, self.columns, dtype) for layer in cast("list[Layer]", prior.layers)]
        self.output_hidden, self.output = (
            ColumnBlocks(conv.weight.flatten(1), math.gcd(8, conv.out_channels), dtype)
            for conv in (prior.output_hidden, prior.output)
        )
        self.hidden_bias, self.bias = (
            cast(Tensor, conv.bias).to(dtype) for conv in (prior.output_hidden, prior.output)
        )
        self.row = self.embedding.new_zeros(batch, self.columns, prior.config.width)  # the embedded codes of this row
        last = self.embedding.new_empty(self.columns, batch, prior.config.width)
        self.outputs = [*(layer.inputs for layer in self.layers[1:]), last.unbind()]  # of each layer, by column: b d
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        device = self.row.device.type
        code = None if previous is None else previous[:, 0]
        if not torch.is_autocast_enabled(device):  # entering a context costs as much as an operation
            return self._next(code)[:, None]
        with torch.autocast(device, enabled=False):
            return self._next(code)[:, None]

    def _next(self, previous: Tensor | None) -> Tensor:
        column = self.position % self.columns
        first = self.layers[0].inputs[column]
        first.zero_()  # what stands left of the first column
        if previous is not None:
            embedded = F.embedding(previous, self.embedding)
            self.row[:, column - 1] = embedded  # at column 0 this completes the row above
            if column:
                first.copy_(embedded)
        if column == 0:
            row = self.row
            for layer in self.layers:
                row = layer.begin_row(row, self.features[self.position // self.columns])
        for layer, outputs in zip(self.layers, self.outputs, strict=True):
            layer.step(column, outputs[column])
        x = self.outputs[-1][column]
        self.position += 1
        hidden = join(self.output_hidden(x.relu())) + self.hidden_bias
        return (join(self.output(hidden.relu())) + self.bias).float()
