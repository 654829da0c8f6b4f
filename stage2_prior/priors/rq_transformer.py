"""RQ-Transformer of Lee et al. 2022 (arXiv:2203.01941), section 3.2: several codes at each place of one grid.

Residual or grouped quantizers give D grids of equal sides, the depths. In one sequence they would cost attention over
D h w codes. Here a large transformer walks the h w places, and a small one the D codes of each place:

    places   class   sum of place 0   sum of place 1   ...    sum: of the embeddings of a place's codes
    walks      |           |                |                 spatial transformer
             what is known before place 0, 1, 2, ...
               |
    depths   known   code 0   code 0 + code 1   ...           sums of embeddings again
    walks      |       |            |                         depth transformer
             code 0  code 1      code 2         ...           logits

The paper's soft labels and stochastic codes, which need the code vectors, are left out: stage two knows codes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.decoding.engine import Decoder
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import NO_CODE, AutoregressivePrior
from stage2_prior.priors.transformer_layers import Block, RMSNorm, StackWeights, TransformerConfig, place_angles
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class RQTransformerConfig:
    kind: Literal["rq_transformer"] = "rq_transformer"
    layers: int = 8  # of the spatial transformer
    depth_layers: int = 2  # of the depth transformer; the paper has 4 beside 24 or more
    width: int = 256  # d, of both
    heads: int = 8  # of both, each of width / heads numbers, a multiple of 4
    dropout: float = 0.0  # of the embedded places
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream

    def __post_init__(self) -> None:
        if self.depth_layers < 1:
            raise UserError(f"depth_layers={self.depth_layers}, expected at least 1")
        self.stack(self.layers)

    def stack(self, layers: int) -> TransformerConfig:
        """Blocks of this width, as the plain transformer has them. Raises UserError when there are no such blocks."""
        return TransformerConfig(
            layers=layers,
            width=self.width,
            heads=self.heads,
            dropout=self.dropout,
            residual_dropout=self.residual_dropout,
        )


class Stack(nn.Module):
    """Causal transformer blocks and a norm: b n d -> b n d."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)


class RQTransformer(AutoregressivePrior):
    """Position by position in raster order, all depths of a position before the next. Raises UserError when the grids
    of the codes have different sides."""

    kind = "rq_transformer"
    reads_given = False
    config_class = RQTransformerConfig
    config: RQTransformerConfig

    def __init__(self, config: RQTransformerConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        if len({(grid.height, grid.width) for grid in code_spec.grids}) > 1:
            raise UserError(
                f"got codes of {code_spec.describe()}, expected grids of equal sides: an {self.kind} prior models the "
                "depths of a residual or grouped quantizer; take a transformer prior for grids of several sizes"
            )
        self.vocabularies = [grid.vocabulary for grid in code_spec.grids]
        self.depth = len(self.vocabularies)
        self.classes = nn.Embedding(num_classes + 1, config.width)  # the last one is the null label
        self.embedding = nn.Embedding(sum(self.vocabularies), config.width)  # depth after depth
        self.depths = nn.Embedding(self.depth, config.width)  # of the code to be predicted
        self.dropout = nn.Dropout(config.dropout)
        self.spatial = Stack(config.stack(config.layers))
        self.over_depth = Stack(config.stack(config.depth_layers))
        self.output = nn.Linear(config.width, sum(self.vocabularies), bias=False)
        self.initialise()

    def initialise(self) -> None:
        """As the plain transformer: normal of 0.02, and less for what adds to a residual stream."""
        layers = {"spatial": self.config.layers, "over_depth": self.config.depth_layers}
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers[name.split(".")[0]]) if adds else 0.02)

    def sequence(self, codes: Codes, condition: Condition) -> Tensor:
        """`b n`: place after place, and at each the codes of all depths."""
        super().sequence(codes, condition)  # which checks both
        return rearrange(torch.stack(codes), "depth b h w -> b (h w depth)")

    def grids_of(self, sequence: Tensor) -> tuple[Tensor, ...]:
        height = self.code_spec.grids[0].height
        return tuple(rearrange(sequence, "b (h w depth) -> depth b h w", h=height, depth=self.depth))

    def angles(self) -> tuple[Tensor, Tensor]:
        """Of both transformers, as `place_angles`: a depth is turned as a row would be."""
        head_width, device = self.spatial.config.head_width, self.embedding.weight.device
        depths = Grid("depths", self.depth, 1, 1)
        return place_angles(self.code_spec.grids[:1], head_width, device), place_angles([depths], head_width, device)

    def first_numbers(self) -> list[int]:
        """Where the embeddings of each depth begin."""
        return [sum(self.vocabularies[:depth]) for depth in range(self.depth)]

    def class_token(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, what stands before the first place."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        sequence = self.sequence(codes, condition)
        batch = len(sequence)
        over_places, over_depths = self.angles()
        tokens = rearrange(sequence, "b (n depth) -> b n depth", depth=self.depth)
        first = torch.tensor(self.first_numbers(), device=tokens.device)
        sums = self.embedding(tokens + first).cumsum(dim=2)  # b n depth d, of all depths up to each
        start = self.class_token(batch, condition)[:, None]
        known = self.spatial(self.dropout(torch.cat([start, sums[:, :-1, -1]], dim=1)), over_places)  # b n d
        x = torch.cat([known[:, :, None], sums[:, :, :-1]], dim=2) + self.depths.weight  # b n depth d
        x = self.over_depth(rearrange(x, "b n depth d -> (b n) depth d"), over_depths)
        largest = max(self.vocabularies)
        parts = [
            F.pad(F.linear(x[:, depth], weight), (0, largest - len(weight)), value=NO_CODE)
            for depth, weight in enumerate(self.output.weight.split(self.vocabularies))
        ]
        return rearrange(torch.stack(parts), "depth (b n) k -> b (n depth) k", b=batch)

    @property
    def numbers_kept(self) -> int:
        places = self.config.layers * self.code_spec.grids[0].size + self.config.depth_layers * self.depth
        return 2 * places * self.config.width

    def stepper(self, batch: int, condition: Condition) -> RQTransformerStepper:
        return RQTransformerStepper(self, batch, condition)


class StepWeights:
    """What sampling reads of an RQ-Transformer, made once for each of its states."""

    def __init__(self, prior: RQTransformer, dtype: torch.dtype):
        over_places, over_depths = prior.angles()
        self.embeddings = [part.to(dtype) for part in prior.embedding.weight.detach().split(prior.vocabularies)]
        self.depths = prior.depths.weight.detach().to(dtype).unbind()
        spatial, over_depth = prior.spatial, prior.over_depth
        self.spatial = StackWeights(spatial.config, spatial.blocks, spatial.norm.gain, [], over_places, dtype)
        outputs = prior.output.weight.split(prior.vocabularies)
        self.over_depth = StackWeights(
            over_depth.config, over_depth.blocks, over_depth.norm.gain, outputs, over_depths, dtype
        )
        self.spatial_gain = (spatial.norm.gain.detach() * self.spatial.root).to(dtype)


class RQTransformerStepper:
    """One code per call: the depth transformer each time, over the codes of a place from the first on; the spatial one
    at the first depth of each place. Computes in autocast's type where autocast is on when it is made, else in the
    weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: RQTransformer, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, dtype = prior.embedding.weight.device, step_dtype(prior.embedding.weight)
        self.weights = prepared(prior, dtype, lambda: StepWeights(prior, dtype), rows=batch)
        self.depth = prior.depth
        places = prior.code_spec.grids[0].size
        self.spatial = Decoder(self.weights.spatial.weights, batch, places, dtype, device)
        self.over_depth = Decoder(self.weights.over_depth.weights, batch, self.depth, dtype, device)
        self.sum = prior.class_token(batch, condition.to(device)).to(dtype)  # b d, of this place's codes so far
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        with torch.autocast(self.sum.device.type, enabled=False):
            return self._next(previous)[:, None]

    def _next(self, previous: Tensor | None) -> Tensor:
        place, depth = divmod(self.position, self.depth)
        weights = self.weights
        if previous is not None:
            embedded = F.embedding(previous[:, 0], weights.embeddings[depth - 1])
            self.sum = embedded if depth == 1 % self.depth else self.sum + embedded
        x = self.sum
        if depth == 0:
            x = self.spatial.step(x, place) * weights.spatial_gain
        self.position += 1
        states = self.over_depth.step(x + weights.depths[depth], depth)
        return weights.over_depth.outputs[depth].joined(states).float()
