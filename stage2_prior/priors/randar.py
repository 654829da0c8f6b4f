"""RandAR: codes in any order (Pang et al. 2024, arXiv:2412.01827), by LlamaGen's blocks.

Before each code stands a position instruction token, which says where it will be, and tells it:

    input      class   where o0?   code o0   where o1?   code o1   ...   where on-1?
    logits of          code o0               code o1               ...   code on-1

Instruction tokens are one learned vector, turned as the queries of its place are (2-D rotary positions), and attention
turns both tokens of a code by its place. Trained on random orders, it samples in any: in a random one for each sample,
with the codes that are known first, so that those which are drawn see all of them, and, as instructions can be read
together, several codes at a step. Evaluated and compressed is the raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.draws import uniform
from stage2_prior.condition import Condition
from stage2_prior.decoding.engine import Decoder
from stage2_prior.decoding.prepared import prepared
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.llamagen import EPSILON, Block, LlamaGenConfig, StepWeights, place_turns, turn
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class RandARConfig:
    kind: Literal["randar"] = "randar"
    layers: int = 8
    width: int = 256  # d
    heads: int = 8  # each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    hidden_width: int | None = None  # of SwiGLU; None: 8/3 of the width, rounded up to a multiple of 256
    dropout: float = 0.0  # of the embedded sequence
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream

    def __post_init__(self) -> None:
        _ = self.network  # refuses impossible sizes

    @property
    def network(self) -> LlamaGenConfig:
        return LlamaGenConfig.sizes_of(self)


class RandAR(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid."""

    kind = "randar"
    config_class = RandARConfig
    config: RandARConfig
    reads_given = False
    takes_windows = True
    takes_orders = True
    draws_in_any_order = True

    def __init__(self, config: RandARConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid, self.network = self.only_grid(), config.network
        self.classes = nn.Embedding(num_classes + 1, config.width)  # the last one is the null label
        self.embedding = nn.Embedding(self.grid.vocabulary, config.width)
        self.instruction = nn.Parameter(torch.empty(config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(self.network) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, EPSILON)
        self.output = nn.Linear(config.width, self.grid.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.instruction, std=0.02)
        nn.init.zeros_(self.output.weight)

    def training_order(self, batch: int, progress: float, device: torch.device) -> Tensor:
        return uniform(batch, self.grid.size, device=device).argsort(dim=1)

    def order_of(self, condition: Condition, batch: int) -> Tensor:
        """`b n`"""
        if condition.order is not None:
            return condition.order
        return torch.arange(self.grid.size, device=self.embedding.weight.device).expand(batch, -1)

    def class_tokens(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, the start of the sequence."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def turns(self) -> Tensor:
        """Of the class, which is 0, and of each place of the grid, `1+n d_head/2`: see `place_turns`. No buffer: a
        model in bfloat16 would round them."""
        return place_turns(self.grid, 1, self.network.head_width, self.embedding.weight.device)

    def instructions(self) -> Tensor:
        """Of each place of the grid, `n d`."""
        by_head = rearrange(self.instruction, "(heads d) -> 1 heads 1 d", heads=self.config.heads)
        turned = turn(by_head.expand(-1, -1, self.grid.size, -1), self.turns()[1:])
        return rearrange(turned, "1 heads n d -> n (heads d)")

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        """In the order of `condition`, where it has one."""
        tokens = self.sequence(codes, condition)  # b n
        order = self.order_of(condition, len(tokens))
        pairs = torch.stack([F.embedding(order, self.instructions()), self.embedding(tokens)], dim=2)  # b n 2 d
        start = self.class_tokens(len(tokens), condition)[:, None]
        x = self.dropout(torch.cat([start, pairs.flatten(1, 2)[:, :-1]], dim=1))  # b 2n d
        turned_as = F.pad((1 + order).repeat_interleave(2, dim=1)[:, :-1], (1, 0))  # b 2n
        turns = self.turns()[turned_as][:, None]  # b 1 2n d/2
        for block in self.blocks:
            x = block(x, turns, None)
        return self.output(self.norm(x[:, 1::2]))

    @property
    def numbers_kept(self) -> int:
        return 2 * self.config.layers * 2 * self.grid.size * self.config.width

    def stepper(self, batch: int, condition: Condition) -> RandARStepper:
        return RandARStepper(self, batch, condition)


class RandARStepper:
    """The codes that come next in the order of each sample, one or a window or a group of them per call.

    Place 0 of the cache is the class; codes number i of the order have places 2i + 1, the instruction, and 2i + 2, the
    code. All that a place sees before it must have been seen by earlier calls."""

    @torch.inference_mode()
    def __init__(self, prior: RandAR, batch: int, condition: Condition):
        prior.check(batch, condition)
        device, dtype = prior.embedding.weight.device, step_dtype(prior.embedding.weight)
        condition = condition.to(device)
        self.weights = prepared(prior, dtype, lambda: StepWeights(prior, prior.network, dtype))
        self.order = prior.order_of(condition, batch)  # b n
        with torch.autocast(device.type, enabled=False):
            self.start = prior.class_tokens(batch, condition).to(dtype)
            self.instructions = prior.instructions().to(dtype)
        self.decoder = Decoder(self.weights.weights, batch, 2 * prior.grid.size, dtype, device)
        self.position = 0

    def next(self, previous: Tensor | None) -> Tensor:
        first = torch.full_like(self.order[:, 0], self.position)
        self.position += 1
        return self.window(first, first[:, None] if previous is None else previous)

    @torch.inference_mode()
    def window(self, first: Tensor, previous: Tensor) -> Tensor:
        with torch.autocast(self.start.device.type, enabled=False):
            width = previous.shape[1]
            codes = first[:, None] - 1 + torch.arange(width, device=first.device)  # b w, numbers in the order
            places = torch.stack([codes, codes + 1], dim=2).flatten(1)  # of the code before, and of the one asked for
            embedded = F.embedding(previous.clamp(min=0), self.weights.embedding)
            x = torch.stack([embedded, self.instructed(codes + 1)], dim=2).flatten(1, 2)
            x = torch.where((places < 0)[..., None], self.start[:, None], x)
            return self.told(x, 2 * first, places)[:, 1::2]

    @torch.inference_mode()
    def group(self, sequence: Tensor, seen: Sequence[int], done: Sequence[int], width: int) -> Tensor:
        """Logits `b width k`, float32, of the codes from number `done` of each sample's order on, told together: each
        from all codes before `done`. sequence: int64 b n, in that order; seen: how many of them earlier calls were
        given, -1 before the first. Those of codes beyond the last mean nothing."""
        with torch.autocast(self.start.device.type, enabled=False):
            device, n = self.order.device, self.order.shape[1]
            # Behind the first instruction that the call before was asked, which saw the right codes; that again for a
            # sample of which no more is known.
            begins = [0 if old < 0 else min(2 * old + 2, 2 * new + 1) for old, new in zip(seen, done, strict=True)]
            pairs = max(2 * end + 1 - begin for begin, end in zip(begins, done, strict=True))
            first = torch.tensor(begins, device=device)  # b
            known = torch.tensor(done, device=device)[:, None] * 2  # the last place of a code
            at = first[:, None] + torch.arange(pairs + width, device=device)  # b w, places
            pair, is_code = (at - 1).div(2, rounding_mode="floor"), (at % 2 == 0) & (at <= known)
            numbers = torch.where(at <= known, pair, known // 2 + at - known - 1)  # in the order, -1 of the class
            embedded = F.embedding(sequence.gather(1, numbers.clamp(0, n - 1)).clamp(min=0), self.weights.embedding)
            x = torch.where(is_code[..., None], embedded, self.instructed(numbers))
            x = torch.where((numbers < 0)[..., None], self.start[:, None], x)
            logits = self.told(x, first, numbers)
            asked = (known + 1 - first[:, None]) + torch.arange(width, device=device)  # b width, in the window
            return logits.gather(1, asked[..., None].expand(-1, -1, logits.shape[-1]))

    def instructed(self, numbers: Tensor) -> Tensor:
        """Instruction tokens, `b w d`, of the codes of these numbers in the order."""
        return F.embedding(self.order.gather(1, numbers.clamp(0, self.order.shape[1] - 1)), self.instructions)

    def told(self, x: Tensor, first: Tensor, numbers: Tensor) -> Tensor:
        """Logits `b w k` at the places from `first` on; numbers: of their codes in the order, -1 of the class."""
        cells = self.order.gather(1, numbers.clamp(0, self.order.shape[1] - 1)) + 1
        states = self.decoder.window(x, first, turned_as=torch.where(numbers < 0, 0, cells))
        return self.weights.output.joined(states.flatten(0, 1)).float().unflatten(0, numbers.shape)
