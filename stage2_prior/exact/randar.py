"""The exact walk of `RandAR`, in raster order."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.exact.llamagen import ExactBlock, normalised, place_turns
from stage2_prior.exact.transformer import turned
from stage2_prior.priors.llamagen import Block
from stage2_prior.priors.randar import RandAR


class ExactRandAR:
    """A `Stepper` of float64 logits that are the same on every machine. What comes before an instruction, the class or
    a code, and the instruction itself go one after the other."""

    @torch.inference_mode()
    def __init__(self, prior: RandAR, batch: int, condition: Condition):
        prior.check(batch, condition)
        assert condition.order is None
        network, device = prior.network, prior.embedding.weight.device
        classes, labels = prior.classes.weight.double(), condition.to(device).labels
        self.before = (classes[-1:].expand(batch, -1) if labels is None else classes[labels])[:, None]  # b 1 d
        self.embedding = prior.embedding.weight.double()
        # Of the class, and of each place but the last, of which `place_turns` knows no turn, as LlamaGen needs none.
        grid = prior.grid
        taller = type(grid)(grid.name, grid.height + 1, grid.width, grid.vocabulary)
        turns = place_turns(taller, 1, network.head_width, device)
        self.turns = [part[: 1 + grid.size] for part in turns]
        by_head = prior.instruction.double().view(1, network.heads, 1, -1).expand(-1, -1, grid.size, -1)
        cosine, sine = (part[1:] for part in self.turns)
        self.instructions = turned(by_head, cosine, sine)[0].transpose(0, 1).flatten(1)  # n d
        self.blocks = [ExactBlock(block, batch, 2 * grid.size) for block in cast("list[Block]", prior.blocks)]
        self.gain = prior.norm.weight.double()
        self.output = Product.of(prior.output)
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        position = self.position
        self.through(self.before if previous is None else self.embedding[previous], position)
        self.position += 1
        x = self.through(self.instructions[position].expand(len(self.before), 1, -1), position + 1)
        return self.output(normalised(x).mul_(self.gain))

    def through(self, x: Tensor, row: int) -> Tensor:
        """x, b 1 d, at the next place of the sequence, which turns as this row of `turns`, through all blocks."""
        cosine, sine = (part[row : row + 1] for part in self.turns)
        for block in self.blocks:
            x = block(x, cosine, sine, None)
        return x
