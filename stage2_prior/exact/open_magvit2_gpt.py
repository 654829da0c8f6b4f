"""The exact walk of `OpenMAGVIT2GPT`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.exact.llamagen import ExactBlock, normalised, place_turns
from stage2_prior.priors.llamagen import Block
from stage2_prior.priors.open_magvit2_gpt import OpenMAGVIT2GPT, rows_for


class ExactOpenMAGVIT2GPT:
    """A `Stepper` of float64 logits that are the same on every machine. The spatial blocks go one place further at the
    first code of each, and those of the factors begin anew there."""

    @torch.inference_mode()
    def __init__(self, prior: OpenMAGVIT2GPT, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, grid, self.factors = prior.classes.weight.device, prior.code_spec.grids[0], prior.factors
        self.turns = place_turns(rows_for(grid, self.factors + 1), 1, prior.network.head_width, device)
        self.blocks = stack(prior.blocks, batch, grid.size)
        self.factor_blocks = stack(prior.factor_blocks, batch, self.factors)
        self.embeddings = [table.weight.double() for table in cast("list[nn.Embedding]", prior.code_embeddings)]
        self.gain = prior.norm.weight.double()
        self.outputs = [Product.of(output) for output in cast("list[nn.Linear]", prior.outputs)]
        classes, labels = prior.classes.weight.double(), condition.to(device).labels
        start = classes[-1:].expand(batch, -1) if labels is None else classes[labels]
        self.sum = start[:, None]  # b 1 d, of this place's codes so far, in their order; at first the class
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        place, factor = divmod(self.position, self.factors)
        x = self.sum
        if previous is not None:
            x = self.embeddings[factor - 1][previous]
            self.sum = x if factor == 1 % self.factors else self.sum + x
        if factor == 0:
            x = self.walked(self.blocks, self.sum, place)
            for block in self.factor_blocks:
                block.attention.places = 0
        self.position += 1
        return self.outputs[factor](normalised(self.walked(self.factor_blocks, x, factor)).mul_(self.gain))

    def walked(self, blocks: list[ExactBlock], x: Tensor, place: int) -> Tensor:
        """x: b 1 d, at the next place of a stack."""
        cosine, sine = (part[place : place + 1] for part in self.turns)
        for block in blocks:
            x = block(x, cosine, sine, None)
        return x


def stack(blocks: nn.ModuleList, batch: int, places: int) -> list[ExactBlock]:
    return [ExactBlock(block, batch, places) for block in cast("list[Block]", blocks)]
