"""The exact walk of `PixelCNN`."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes
from common import exact
from common.exact import Product, factors_of
from stage2_prior.condition import Condition
from stage2_prior.exact.convolution import Taps
from stage2_prior.exact.given_codes import given_features
from stage2_prior.priors.pixelcnn import Layer, PixelCNN


class ExactPixelCNN:
    """A `Stepper` of float64 logits that are the same on every machine. The vertical stack runs a row at a time, as
    soon as the row above is known, the horizontal one place by place."""

    @torch.inference_mode()
    def __init__(self, prior: PixelCNN, batch: int, condition: Condition):
        prior.check(batch, condition)
        condition = condition.to(prior.embedding.weight.device)
        self.columns = prior.grid.width
        self.features: Tensor | None = None  # of given codes, h w b c
        if prior.given_codes is not None:
            self.features = given_features(prior.given_codes, cast(Codes, condition.codes))
        self.embedding = prior.embedding.weight.double()
        labels = prior.labels(batch, condition)
        self.layers = [ExactLayer(layer, labels, self.columns) for layer in cast("list[Layer]", prior.layers)]
        self.output_hidden, self.output = (
            Product(convolution.weight.flatten(1), convolution.bias)
            for convolution in (prior.output_hidden, prior.output)
        )
        self.row = self.embedding.new_zeros(self.columns, batch, prior.config.width)  # the embedded codes of this row
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        row, column = divmod(self.position, self.columns)
        if previous is not None:
            self.row[column - 1] = F.embedding(previous[:, 0], self.embedding)  # at column 0, of the row above
        if column == 0:
            self.begin_row(row)
        x = self.row[column - 1] if column else torch.zeros_like(self.row[0])
        for layer in self.layers:
            x = layer.step(column, x)
        self.position += 1
        return self.output(self.output_hidden(x.relu()).relu_())[:, None]

    def begin_row(self, row: int) -> None:
        vertical = self.row
        for layer in self.layers:
            vertical = layer.begin_row(vertical, None if self.features is None else self.features[row])


class ExactLayer:
    """A layer on its way through the image: the rows that the vertical stack still needs, what it has told the
    horizontal stack about this row, and this row of the horizontal stack so far."""

    def __init__(self, layer: Layer, labels: Tensor, columns: int):
        width = layer.out.in_channels
        self.reach, self.residual = layer.reach, layer.residual
        self.vertical = Taps(layer.vertical.weight)
        self.vertical_to_horizontal = Product(layer.vertical_to_horizontal.weight.flatten(1))
        self.horizontal = Product(layer.horizontal.weight.transpose(1, 3).flatten(1))  # 2d (tap d)
        self.out = Product(layer.out.weight.flatten(1))
        self.class_bias = F.embedding(labels, layer.class_bias.weight.double())  # b 4d
        self.given_bias = None if layer.given_bias is None else Product(layer.given_bias.weight.flatten(1))
        self.rows = factors_of(self.class_bias.new_empty(0, columns, len(labels), width))  # the last ones: rows w b d
        self.left = self.class_bias.new_zeros(len(labels), layer.reach + columns, width)
        self.from_above: Tensor  # w b 2d, made in `begin_row`

    def begin_row(self, row: Tensor, features: Tensor | None) -> Tensor:
        """The vertical stack for a whole row, w b d -> w b d. features: of given codes in this row, w b c."""
        bias = self.class_bias
        if self.given_bias is not None and features is not None:
            bias = self.given_bias(features).add_(bias)
        vertical_bias, horizontal_bias = bias.chunk(2, dim=-1)
        self.rows = torch.cat([self.rows[-self.reach :], factors_of(row)[None]])
        above = row.new_zeros(*row.shape[:2], 2 * row.shape[2])
        self.vertical.add_to(above[None], self.rows, self.reach + 1 - len(self.rows), self.reach)
        self.from_above = self.vertical_to_horizontal(above).add_(horizontal_bias)
        return gate(above.add_(vertical_bias))

    def step(self, column: int, x: Tensor) -> Tensor:
        """The horizontal stack at one column, b d -> b d."""
        self.left[:, self.reach + column] = x
        seen = self.left[:, column : column + self.reach + 1].flatten(1)
        new = self.out(gate(self.horizontal(seen).add_(self.from_above[column])))
        return new.add_(x) if self.residual else new


def gate(x: Tensor) -> Tensor:
    """tanh of one half of the last axis times sigmoid of the other."""
    signal, opening = x.chunk(2, dim=-1)
    return exact.tanh(signal).mul_(exact.sigmoid(opening))
