"""What masked priors share (`MaskedPrior`), and the network of most of them (`MaskedTransformer`): a bidirectional
transformer that predicts all codes which are hidden from those which are not (BERT, Devlin et al. 2018,
arXiv:1810.04805; for images MaskGIT, Chang et al. 2022, arXiv:2202.04200).

    input      class   given codes   code 0   mask     mask     code 3   ...
    logits of                                 code 1   code 2

The blocks are those of transformer.py, but every place sees every other. Codes that the prior is given (coarser levels,
or codes of another tokenizer) stand in the same sequence and are never hidden. Each grid has a mask token of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.draws import uniform
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.cross_entropy import nll_of, smoothed_nll_of
from stage2_prior.masked_sampling import SHARES, Draw, Fill, Uniforms, filling_by
from stage2_prior.priors.base import NO_CODE, Places, Prior
from stage2_prior.priors.transformer_layers import FeedForward, RMSNorm, TransformerConfig, place_angles, turn
from stage2_prior.sampling_config import MaskSchedule, Order


class LevelsConfig(Protocol):
    """The field that the configs of all masked priors share."""

    @property
    def nll_levels(self) -> int: ...


class MaskedConfig(LevelsConfig, Protocol):
    """The fields that those of a `MaskedTransformer` share."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def residual_dropout(self) -> float: ...


def network_of(config: MaskedConfig) -> TransformerConfig:
    """The sizes of the network, as the parts of transformer.py want them. Raises UserError for those that cannot be."""
    if config.nll_levels < 1:
        raise UserError(
            f"nll_levels={config.nll_levels}, expected at least 1: each tells the nll at one share of masks"
        )
    return TransformerConfig(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        dropout=config.dropout,
        residual_dropout=config.residual_dropout,
    )


class Attention(nn.Module):
    """Self-attention of all places to all."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        attended = F.scaled_dot_product_attention(turn(q, angles), turn(k, angles), v)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


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


class MaskedPrior(Prior):
    """Codes of any number of grids, in any order: `masked_logits`. Kinds differ in which shares of the codes they hide
    in training, how they weigh the loss, and in `sampling_steps`, `mask_schedule` and `fill_order`, by which they are
    sampled unless one says; a kind that none of these fits has `hidden_share` and `filling` of its own."""

    sampling_steps: ClassVar[int]
    mask_schedule: ClassVar[MaskSchedule]
    fill_order: ClassVar[Order]
    config: LevelsConfig
    parts_per_code = 1  # that are hidden and filled in one by one, where it goes its own way; see `masked_logits`

    def __init__(self, config: LevelsConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.sizes = [grid.size for grid in code_spec.grids]
        self.vocabularies = [grid.vocabulary for grid in code_spec.grids]
        self.masks: Tensor  # n, the number that stands for a hidden code
        self.register_buffer("masks", self.per_code(self.vocabularies), persistent=False)

    def per_code(self, per_grid: Sequence[int]) -> Tensor:
        """A number of each grid for each of its codes: `n`."""
        return torch.tensor([number for number, size in zip(per_grid, self.sizes, strict=True) for _ in range(size)])

    def masked_logits(self, sequence: Tensor, condition: Condition) -> Tensor:
        """Logits `b n k` of every code of a `sequence` b n, -1 where a code is hidden, given all that are not. Where
        grids differ in their vocabulary, k is the largest, and numbers that are no codes of a grid have logits of
        NO_CODE. A prior of several `parts_per_code` has numbers of its own below -1 for codes that are hidden in
        part."""
        largest = max(self.vocabularies)
        parts = self.logits_of_grids(sequence, condition)
        return torch.cat([F.pad(part, (0, largest - part.shape[-1]), value=NO_CODE) for part in parts], dim=1)

    def no_codes(self, sequence: Tensor) -> Tensor | None:
        """Which numbers no place of a `sequence` b n may become, those that are no codes of its grid: `n k` or `b n k`,
        bool; None where all may be."""
        largest = max(self.vocabularies)
        if largest == min(self.vocabularies):
            return None
        return torch.arange(largest, device=self.masks.device) >= self.masks[:, None]

    def logits_of_grids(self, sequence: Tensor, condition: Condition) -> list[Tensor]:
        """`masked_logits`, one `b n k` for each grid."""
        raise NotImplementedError

    def hidden_share(self, progress: float) -> float:
        """Share of the codes that are still hidden when `progress` (0 to 1) of the sampling steps are done: 1 to 0."""
        return SHARES[self.mask_schedule](progress)

    def filling(
        self,
        counts: Sequence[Sequence[int]],
        known: Tensor,
        uniforms: Uniforms,
        draw: Draw,
        choice_temperature: float | None,
    ) -> Fill:
        """Which hidden codes a step fills in, and with what. counts: how many each step fills of each sample
        (`codes_per_step`), or how many parts of them. known: b n, bool, where no code is hidden. choice_temperature:
        None for a prior that has none of its own."""
        return filling_by(
            self.fill_order, counts, known, self.code_spec.grids, uniforms, draw, choice_temperature or 0.0
        )

    def hidden_nll(self, sequence: Tensor, hidden: Tensor, condition: Condition, label_smoothing: float = 0) -> Tensor:
        """Cross-entropy `b n`, float32, in nats, of the codes that are `hidden` (bool, b n) given the others, which
        have 0."""
        parts = self.logits_of_grids(sequence.masked_fill(hidden, -1), condition)
        losses = [
            nll_of(logits, codes) if label_smoothing == 0 else smoothed_nll_of(logits, codes, label_smoothing)
            for logits, codes in zip(parts, sequence.split(self.sizes, 1), strict=True)
        ]
        return torch.cat(losses, dim=1).masked_fill(~hidden, 0.0)

    def nll(self, codes: Codes, condition: Condition, seed: int = 0) -> Tensor:
        """An upper bound on the negative log-likelihood of each code, `b n` float32, in nats.

        A masked prior can draw codes in any order, one at a time. The bound is the mean negative log-likelihood over
        all orders, each as probable (Hoogeboom et al. 2022, arXiv:2110.02037); the image itself, which any order could
        have made, is at least as probable (Jensen). Here it is estimated, without bias, from random sets of hidden
        codes: `nll_levels` sizes of sets, spread evenly from one code to all. The sets are a function of the image's
        codes and the seed alone, so the same image has the same estimate in any batch; another seed gives another."""
        sequence = self.sequence(codes, condition)
        hidden, weights = hidden_for_nll(sequence, self.config.nll_levels, seed)
        total = torch.zeros(sequence.shape, device=sequence.device)
        for level, weight in zip(hidden.unbind(1), weights.unbind(1), strict=True):
            total = total + weight[:, None] * self.hidden_nll(sequence, level, condition)
        return total


class MaskedTransformer(MaskedPrior):
    """The network of MaskGIT and absorbing diffusion here: blocks of transformer.py without an order."""

    config: MaskedConfig

    def __init__(self, config: MaskedConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`."""
        super().__init__(config, code_spec, num_classes, **facts)
        self.network = network_of(config)
        width = config.width
        self.classes = nn.Embedding(num_classes + 1, width)  # the last one is the null label
        # Grid after grid: those that are given, then those of the prior, each with its mask behind its codes.
        given = [grid.vocabulary for grid in self.given]
        rows = given + [vocabulary + 1 for vocabulary in self.vocabularies]
        self.embedding = nn.Embedding(sum(rows), width)
        # Where all codes are hidden, only this tells places apart in the first layer.
        self.places = nn.Embedding(1 + sum(grid.size for grid in self.given) + code_spec.codes_per_image, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(self.network) for _ in range(config.layers))
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, sum(self.vocabularies), bias=False)
        self.initialise()

        first = [sum(rows[:number]) for number in range(len(rows))]  # where the embeddings of each grid begin
        self.given_offsets = first[: len(given)]
        self.offsets: Tensor  # n, of the embeddings of each code's grid
        self.register_buffer("offsets", self.per_code(first[len(given) :]), persistent=False)

    def place_tables(self) -> dict[str, Places]:
        grids = tuple((grid.height, grid.width) for grid in (*self.given, *self.code_spec.grids))
        return {"places.weight": Places(1, grids)}

    def initialise(self) -> None:
        """As GPT-2: normal of 0.02, and less for what adds to the residual stream, so that its variance does not
        grow with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.network.layers) if adds else 0.02)

    def logits_of_grids(self, sequence: Tensor, condition: Condition) -> list[Tensor]:
        self.check(len(sequence), condition)
        start = self.class_token(len(sequence), condition)
        x = torch.cat([start[:, None], self.embedded(sequence, condition)], dim=1)  # b 1+given+n d
        x = self.dropout(x + self.places.weight)
        # No buffer: a model in bfloat16 would round its angles.
        angles = place_angles([*self.given, *self.code_spec.grids], self.network.head_width, x.device)
        for block in self.blocks:
            x = block(x, angles)
        x = self.norm(x[:, -sequence.shape[1] :])
        outputs = zip(x.split(self.sizes, 1), self.output.weight.split(self.vocabularies), strict=True)
        return [F.linear(part, weight) for part, weight in outputs]

    def given_tokens(self, condition: Condition) -> list[Tensor]:
        """Rows of the embedding, `b n` for each grid that is given."""
        return [
            rearrange(grid, "b h w -> b (h w)") + offset
            for grid, offset in zip(condition.codes or (), self.given_offsets, strict=True)
        ]

    def embedded(self, sequence: Tensor, condition: Condition) -> Tensor:
        """Vectors of the codes that are given, and of those of a `sequence`: b given+n d."""
        own = torch.where(sequence < 0, self.masks, sequence) + self.offsets
        return self.embedding(torch.cat([*self.given_tokens(condition), own], dim=1))

    def class_token(self, batch: int, condition: Condition) -> Tensor:
        """`b d`, the start of the sequence."""
        if condition.labels is None:
            return self.classes.weight[-1].expand(batch, -1)
        return self.classes(condition.labels)


def hide(counts: Tensor, positions: int) -> Tensor:
    """Random sets of `counts` (b) of the positions: `b n`, bool."""
    return rank(uniform(len(counts), positions, device=counts.device)) < counts[:, None]


def rank(numbers: Tensor) -> Tensor:
    """How many numbers of the same row come before each, in ascending order: `... n`."""
    return numbers.argsort(dim=-1).argsort(dim=-1)


def hidden_for_nll(sequence: Tensor, levels: int, seed: int) -> tuple[Tensor, Tensor]:
    """For each of some levels a random set of codes to hide, `b levels n` bool, and a weight, `b levels`. The weighted
    sum of the nll of hidden codes has the expectation that `MaskedPrior.nll` promises.

    In a random order, the code that comes with i codes unknown, itself included, is one of a random set of i. With i
    from 1 to n equally often, each hidden code of a set of i counts n / i times."""
    positions = sequence.shape[1]
    levels = min(levels, positions)  # with as many levels as codes, every size of the set has its turn
    numbers = [numbers_of(row, seed, 1 + levels * positions) for row in sequence.cpu().numpy()]
    offset, order = torch.from_numpy(np.stack(numbers)).split([1, levels * positions], dim=1)
    sizes = ((torch.arange(levels) + offset) / levels * positions).long().add(1).clamp(max=positions)  # b levels
    hidden = rank(order.unflatten(1, (levels, positions))) < sizes[..., None]
    weights = (positions / sizes / levels).float()
    return hidden.to(sequence.device), weights.to(sequence.device)


def numbers_of(codes: np.ndarray[Any, Any], seed: int, count: int) -> np.ndarray[Any, Any]:
    """`count` uniform numbers in [0, 1), a function of the codes and the seed alone."""
    key = hashlib.blake2b(codes.tobytes() + seed.to_bytes(8, "little"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8"))).random(count)
