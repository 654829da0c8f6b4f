"""The transformer of IBQ (Shi et al. 2024, arXiv:2412.02692): LlamaGen's blocks, whose norms go by the class (AdaLN).

    input      class   code 0   ...   code n-2
    logits of  code 0  code 1   ...   code n-1

The class begins the sequence, as in LlamaGen (llamagen.py), with no position there: queries and keys of its place are
zero. And it speaks to every place: of its vector each block makes gains of what attention and feed-forward add to the
residual stream, and scales and shifts of the RMSNorms before them (AdaLN, Peebles & Xie 2022, arXiv:2212.09748); one
more scale and shift are of the norm before the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from stage2_prior.condition import Condition
from stage2_prior.decoding.prepared import prepared
from stage2_prior.decoding.stepping_copy import stepping_copy
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.priors.llamagen import EPSILON, Attention, FeedForward, LlamaGenConfig, place_turns
from stage2_prior.priors.var import Modulation
from stage2_prior.stepping import step_dtype


@dataclass(frozen=True, kw_only=True)
class IBQGPTConfig:
    """The published models, B to XXL, have 16, 20, 24 and 30 layers, width = 64 * layers, heads = layers."""

    kind: Literal["ibq_gpt"] = "ibq_gpt"
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


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x, b n d, behind its norm, stretched and moved as the class has it, b 1 d."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.modulation = Modulation(config.width, 6)
        self.attention_norm = nn.RMSNorm(config.width, EPSILON)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, EPSILON)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, vectors: Tensor, turns: Tensor) -> Tensor:
        """x: b n d; vectors: of the classes, b d; turns: see `place_turns`, n d_head/2."""
        gain1, gain2, scale1, scale2, shift1, shift2 = self.modulation(vectors).unbind(2)  # b 1 d
        attended = self.attention(modulated(self.attention_norm(x), scale1, shift1), turns, None)
        x = x + gain1 * self.dropout(attended)
        return x + gain2 * self.dropout(self.feed_forward(modulated(self.feed_forward_norm(x), scale2, shift2)))

    def step(self, x: Tensor, modulation: Tensor, turns: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """As `forward` at one place, b 1 d. modulation: what this block makes of the classes, b 1 6 d; turns: of the
        place, 1 d_head/2; keys, values: b heads n d, of all places, where those of this one are written."""
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        attended = self.attention.step(modulated(self.attention_norm(x), scale1, shift1), turns, keys, values, place)
        x = x + gain1 * attended
        return x + gain2 * self.feed_forward(modulated(self.feed_forward_norm(x), scale2, shift2))


class IBQGPT(AutoregressivePrior):
    """Raises UserError when the codes have more than one grid."""

    kind = "ibq_gpt"
    config_class = IBQGPTConfig
    config: IBQGPTConfig
    reads_given = False

    def __init__(self, config: IBQGPTConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.grid, self.network = self.only_grid(), config.network
        self.classes = nn.Embedding(num_classes + 1, config.width)  # the last one is the null label
        self.embedding = nn.Embedding(self.grid.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(self.network) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, EPSILON)
        self.output_modulation = Modulation(config.width, 2)
        self.output = nn.Linear(config.width, self.grid.vocabulary, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Normal of 0.02, and modulations of zero: a fresh block adds nothing to the residual stream."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)

    def class_vectors(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, the start of the sequence and what modulates the norms."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)

    def turns(self) -> Tensor:
        """See `place_turns`. No buffer: a model in bfloat16 would round them."""
        return place_turns(self.grid, 1, self.network.head_width, self.embedding.weight.device)[:-1]

    def logits(self, codes: Codes, condition: Condition) -> Tensor:
        tokens = self.sequence(codes, condition)  # b n
        vectors = self.class_vectors(len(tokens), condition)
        x = self.dropout(torch.cat([vectors[:, None], self.embedding(tokens[:, :-1])], dim=1))  # b n d
        turns = self.turns()
        for block in self.blocks:
            x = block(x, vectors, turns)
        return self.told(x, self.output_modulation(vectors))

    def told(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Logits `b n k` of the codes after these places, b n d; modulation: of the last norm, b 1 2 d."""
        return self.output(modulated(self.norm(x), *modulation.unbind(2)))

    @property
    def numbers_kept(self) -> int:
        return 2 * self.config.layers * self.grid.size * self.config.width

    def stepper(self, batch: int, condition: Condition) -> IBQGPTStepper:
        return IBQGPTStepper(self, batch, condition)


class StepWeights(NamedTuple):
    """What sampling reads of the prior, in the type that it computes in: once for each state of the weights."""

    prior: IBQGPT
    turns: Tensor  # n d_head/2

    @classmethod
    def of(cls, prior: IBQGPT, dtype: torch.dtype) -> StepWeights:
        return cls(stepping_copy(prior, dtype), prior.turns())  # a stepper drops nothing out


class IBQGPTStepper:
    """One code per call: keys and values of earlier places wait in a cache that is allocated once, and what the classes
    are to the blocks is worked out once. Computes in autocast's type where autocast is on when it is made, else in the
    weights' type."""

    @torch.inference_mode()
    def __init__(self, prior: IBQGPT, batch: int, condition: Condition):
        prior.check(batch, condition)
        config, weight = prior.config, prior.embedding.weight
        device, dtype = weight.device, step_dtype(weight)
        self.prior, self.turns = prepared(
            prior, (dtype, prior.training), lambda: StepWeights.of(prior, dtype), rows=batch
        )
        self.blocks = cast("list[Block]", self.prior.blocks)
        self.cache = torch.empty(
            config.layers, 2, batch, config.heads, prior.grid.size, prior.network.head_width, dtype=dtype, device=device
        ).unbind()
        with torch.autocast(device.type, enabled=False):
            vectors = self.prior.class_vectors(batch, condition.to(device))  # b d
            self.modulations = [block.modulation(vectors) for block in self.blocks]  # each b 1 6 d
            self.output_modulation = self.prior.output_modulation(vectors)
        self.start = vectors[:, None]
        self.position = 0

    @torch.inference_mode()
    def next(self, previous: Tensor | None) -> Tensor:
        place = self.position
        with torch.autocast(self.start.device.type, enabled=False):
            x = self.start if previous is None else self.prior.embedding(previous)  # b 1 d
            turns = self.turns[place : place + 1]
            for block, modulation, (keys, values) in zip(self.blocks, self.modulations, self.cache, strict=True):
                x = block.step(x, modulation, turns, keys, values, place)
            self.position += 1
            return self.prior.told(x, self.output_modulation).float()
