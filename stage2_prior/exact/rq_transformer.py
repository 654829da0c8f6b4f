"""The exact walk of `RQTransformer`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from codes.spec import Grid
from common import exact
from common.exact import Product
from stage2_prior.condition import Condition
from stage2_prior.exact.transformer import ExactBlock, place_turns
from stage2_prior.priors.rq_transformer import RQTransformer, Stack
from stage2_prior.priors.transformer_layers import Block, RMSNorm


class ExactRQTransformer:
    """A `Stepper` of float64 logits that are the same on every machine. The spatial transformer goes one place further
    at the first depth of each, and the one of the depths begins anew there."""

    @torch.inference_mode()
    def __init__(self, prior: RQTransformer, batch: int, condition: Condition):
        device = prior.embedding.weight.device
        prior.check(batch, condition)
        self.depth = prior.depth
        self.embeddings = [part.double() for part in prior.embedding.weight.split(prior.vocabularies)]
        self.depths = prior.depths.weight.double()
        self.spatial = ExactStack(prior.spatial, prior.code_spec.grids[0], batch, device)
        self.over_depth = ExactStack(prior.over_depth, Grid("depths", self.depth, 1, 1), batch, device)
        self.outputs = [Product(part) for part in prior.output.weight.split(prior.vocabularies)]
        classes, labels = prior.classes.weight.double(), condition.to(device).labels
        # b d, of this place's codes so far, added in the order of their depths; at first the class.
        self.sum = classes[-1:].expand(batch, -1) if labels is None else classes[labels]
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        depth = self.position % self.depth
        if previous is not None:
            embedded = self.embeddings[depth - 1][previous[:, 0]]
            begins = depth == 1 % self.depth  # the code before is the first of its place
            self.sum = embedded if begins else self.sum + embedded
        x = self.sum
        if depth == 0:
            x = self.spatial.step(x)
            self.over_depth.begin()
        self.position += 1
        return self.outputs[depth](self.over_depth.step(x + self.depths[depth]))[:, None]


class ExactStack:
    """A stack, one place per call, with the keys and values of the places so far."""

    def __init__(self, stack: Stack, grid: Grid, batch: int, device: torch.device):
        """grid: its places."""
        self.turns = place_turns([grid], stack.config.head_width, device)
        self.blocks = [ExactBlock(block, batch, grid.size) for block in cast("list[Block]", stack.blocks)]
        self.gain = stack.norm.gain.double()
        self.place = 0

    def begin(self) -> None:
        """At the first place, with none before it."""
        self.place = 0
        for block in self.blocks:
            block.attention.places = 0

    def step(self, x: Tensor) -> Tensor:
        """x: b d, at the next place. Returns b d."""
        cosine, sine = (part[self.place : self.place + 2] for part in self.turns)
        for block in self.blocks:
            x = block(x, cosine, sine)
        self.place += 1
        return exact.rms_norm(x, RMSNorm.epsilon).mul_(self.gain)
