"""MDM-Prime (Chao et al. 2025, arXiv:2505.18495): absorbing diffusion that hides a code in parts.

A code is a tuple of sub-tokens, the digits of its number: those of FSQ's levels, bits, or digits in any base. As time t
runs from 0 to 1, each sub-token is hidden with probability t, by itself. So a code may be half known:

    code 0 = (3, 1)    code 1 = (?, 0)    code 2 = (?, ?)          input: the vectors of a code's sub-tokens, joined
                       p(code 1 | ...)    p(code 2 | ...)          logits of whole codes: of all its sub-tokens at once

The logits of codes that have other sub-tokens than those known are no code's (`NO_CODE`), so what a code may still
become narrows down with each sub-token, and one that is written stays.

The bound on the likelihood is that of diffusion over sub-tokens: of a hidden one, minus the logarithm of its *own*
probability, the sum over all codes that have it. The loss and the perplexity of the paper and its code have the
probability of the whole code in its place, and so are no bound (of l sub-tokens that are copies of each other it is an
l-th of the entropy); its authors say so in an erratum of 2026, "Dependency Breaks Validity of Loss Functions in Masked
Diffusion Models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, Literal

import torch
from torch import Tensor, nn

from codes.spec import Codes, CodeSpec
from common.draws import spread
from common.errors import UserError
from stage2_prior.condition import Condition
from stage2_prior.masked_sampling import CHOICE_STREAM, CODE_STREAM, Draw, Fill, Uniforms, at, first_places, padded
from stage2_prior.priors.base import NO_CODE, TrainingLoss
from stage2_prior.priors.masked import MaskedTransformer, hidden_for_nll, hide, network_of
from stage2_prior.priors.transformer_layers import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class MDMPrimeConfig:
    kind: Literal["mdm_prime"] = "mdm_prime"
    sub_tokens: int | None = None  # l, of each code, in bases as equal as can be; None: as many as bases, or 2
    bases: tuple[int, ...] | None = None  # of a code's digits, the fastest first: FSQ's levels; None: by sub_tokens
    layers: int = 8
    width: int = 256  # d
    heads: int = 8  # each of width / heads numbers, a multiple of 4: pairs for the row, pairs for the column
    dropout: float = 0.0  # of the embedded sequence
    residual_dropout: float = 0.0  # of what attention and feed-forward add to the residual stream
    nll_levels: int = 8  # passes by which a validation estimates the nll of an image; more: less noise

    def __post_init__(self) -> None:
        _ = self.network  # refuses impossible sizes
        if self.bases is not None:
            object.__setattr__(self, "bases", tuple(self.bases))  # JSON has made a list of it
        if self.bases is not None and (not self.bases or min(self.bases) < 2):
            raise UserError(f"bases={list(self.bases)}, expected numbers of at least 2, such as FSQ's [8, 5, 5, 5]")
        if self.bases is not None and self.sub_tokens not in (None, len(self.bases)):
            raise UserError(
                f"sub_tokens={self.sub_tokens} with {len(self.bases)} bases, expected either: each base is that of one"
            )
        if not 1 <= self.parts <= self.width:
            raise UserError(
                f"sub_tokens={self.parts} with width={self.width}, expected 1 (whole codes) to as many as the width, "
                "which their vectors share"
            )

    @property
    def network(self) -> TransformerConfig:
        return network_of(self)

    @property
    def parts(self) -> int:
        """l"""
        if self.bases is not None:
            return len(self.bases)
        return 2 if self.sub_tokens is None else self.sub_tokens

    def bases_of(self, vocabulary: int) -> tuple[int, ...]:
        """Of the digits of a code of that many, the fastest first. Raises UserError for bases that do not suffice, or
        more of them than can differ."""
        if self.bases is None:
            return least_bases(vocabulary, self.parts)
        product = math.prod(self.bases)
        if product < vocabulary or product // self.bases[-1] >= vocabulary:
            few = product < vocabulary
            raise UserError(
                f"bases={list(self.bases)} for codes of {vocabulary}, expected bases whose product {product} is "
                f"{'at least that' if few else 'above that only with the last one'}; "
                f"{'give larger or more bases' if few else 'leave the last one out'}, such as FSQ's levels"
            )
        return self.bases


def least_bases(vocabulary: int, parts: int) -> tuple[int, ...]:
    """The smallest bases, no two more than 1 apart, in which `parts` digits tell all numbers below `vocabulary`.
    Raises UserError where so many could not all differ."""
    bits = max(1, (vocabulary - 1).bit_length())
    if parts > bits:
        raise UserError(
            f"sub_tokens={parts} for codes of {vocabulary}, expected at most {bits}: digits of base 2 are the smallest"
        )
    base = next(base for base in range(2, vocabulary + 2) if base**parts >= vocabulary)
    smaller = 0
    while base > 2 and smaller < parts and base ** (parts - smaller - 1) * (base - 1) ** (smaller + 1) >= vocabulary:
        smaller += 1
    return (base,) * (parts - smaller) + (base - 1,) * smaller


class MDMPrime(MaskedTransformer):
    """In a sequence, b n, a code that is known has its number, one that is hidden -1, and one that is hidden in part
    a number below: minus 1, minus its digits, each plus 1 or 0 where it is hidden, in bases that are larger by 1."""

    kind = "mdm_prime"
    config_class = MDMPrimeConfig
    config: MDMPrimeConfig
    sampling_steps = 64
    mask_schedule = "linear"
    fill_order = "random"

    bases: Tensor  # n l, of the digits of each place
    worth: Tensor  # n l, of a digit in a code's number
    worth_in_part: Tensor  # n l, of a digit plus 1 in the number of a code that is hidden in part
    rows: Tensor  # n l, where the vectors of each place's digits begin in their table: first that of a hidden one

    def __init__(self, config: MDMPrimeConfig, code_spec: CodeSpec, num_classes: int, **facts: Any):
        """facts: as for `Prior`. Raises UserError for sub-tokens that cannot be of these codes."""
        super().__init__(config, code_spec, num_classes, **facts)
        parts, self.parts_per_code = config.parts, config.parts
        of_grids = [config.bases_of(vocabulary) for vocabulary in self.vocabularies]  # grid l
        rows = [list(accumulate((bases[part] + 1 for bases in of_grids), initial=0)) for part in range(parts)]
        widths = [config.width // parts + (part < config.width % parts) for part in range(parts)]
        # In the place of a vector for each code. Joined, as published: so they cost a code's width, not l times that.
        self.digit_embeddings = nn.ModuleList(
            nn.Embedding(of_part[-1], width) for of_part, width in zip(rows, widths, strict=True)
        )
        self.given_embedding = nn.Embedding(sum(g.vocabulary for g in self.given), config.width) if self.given else None
        del self.embedding
        self.initialise()

        def register(name: str, per_grid: Sequence[Sequence[int]]) -> None:
            columns = [self.per_code(column) for column in zip(*per_grid, strict=True)]
            self.register_buffer(name, torch.stack(columns, dim=1), persistent=False)

        register("bases", of_grids)
        register("worth", [worth_of(bases) for bases in of_grids])
        register("worth_in_part", [worth_of([base + 1 for base in bases]) for bases in of_grids])
        register("rows", list(zip(*(of_part[:-1] for of_part in rows), strict=True)))
        for number, (vocabulary, bases) in enumerate(zip(self.vocabularies, of_grids, strict=True)):
            digits = torch.arange(vocabulary)[:, None] // torch.tensor(worth_of(bases)) % torch.tensor(bases)
            self.register_buffer(f"digits_of_grid{number}", digits, persistent=False)

    def digits_of_codes(self) -> list[Tensor]:
        """Of all codes of each grid, `k l`."""
        return [self.get_buffer(f"digits_of_grid{number}") for number in range(len(self.vocabularies))]

    def digits(self, sequence: Tensor) -> Tensor:
        """`b n l`, -1 where one is hidden, of a `sequence` b n."""
        known = sequence[..., None] // self.worth % self.bases
        in_part = (-1 - sequence[..., None]) // self.worth_in_part % (self.bases + 1) - 1
        return torch.where(sequence[..., None] < 0, in_part, known)

    def sequence_of(self, digits: Tensor) -> Tensor:
        """The inverse of `digits`: `b n`."""
        known = (digits * self.worth).sum(dim=-1)
        in_part = -1 - ((digits + 1) * self.worth_in_part).sum(dim=-1)
        return torch.where((digits < 0).any(dim=-1), in_part, known)

    def embedded(self, sequence: Tensor, condition: Condition) -> Tensor:
        rows = (self.digits(sequence) + 1 + self.rows).unbind(-1)
        own = torch.cat([table(row) for table, row in zip(self.digit_embeddings, rows, strict=True)], dim=-1)
        if self.given_embedding is None:
            return own
        given = self.given_embedding(torch.cat(self.given_tokens(condition), dim=1))
        return torch.cat([given, own], dim=1)

    def cannot_be(self, sequence: Tensor) -> list[Tensor]:
        """Which codes have other digits than those known, one `b n k` bool for each grid."""
        found = []
        for digits, table in zip(self.digits(sequence).split(self.sizes, 1), self.digits_of_codes(), strict=True):
            other = torch.zeros((), dtype=torch.bool, device=sequence.device)
            for digit, of_codes in zip(digits.unbind(-1), table.unbind(-1), strict=True):
                other = other | ((digit[..., None] >= 0) & (digit[..., None] != of_codes))
            found.append(other)
        return found

    def no_codes(self, sequence: Tensor) -> Tensor:
        largest = max(self.vocabularies)
        parts = [
            nn.functional.pad(grid, (0, largest - grid.shape[-1]), value=True) for grid in self.cannot_be(sequence)
        ]
        return torch.cat(parts, dim=1)

    def logits_of_grids(self, sequence: Tensor, condition: Condition) -> list[Tensor]:
        parts = zip(super().logits_of_grids(sequence, condition), self.cannot_be(sequence), strict=True)
        return [logits.masked_fill(other, NO_CODE) for logits, other in parts]

    def sub_token_nll(self, digits: Tensor, hidden: Tensor, condition: Condition) -> Tensor:
        """Negative logarithm of the probability, `b n l` float32, in nats, of each of the `digits` (b n l) that is
        `hidden` (bool), given those that are not, which have 0."""
        logits = self.logits_of_grids(self.sequence_of(digits.masked_fill(hidden, -1)), condition)
        parts = zip(logits, digits.split(self.sizes, 1), self.digits_of_codes(), strict=True)
        nll = torch.cat([nll_of_digits(grid, own, table) for grid, own, table in parts], dim=1)
        return nll.masked_fill(~hidden, 0.0)

    def forward(self, codes: Codes, condition: Condition) -> TrainingLoss:
        """The bound on the nll per code, estimated as in `Diffusion`, with sub-tokens in the place of codes."""
        digits = self.digits(self.sequence(codes, condition))  # b n l
        parts = math.prod(digits.shape[1:])
        counts = (parts * spread(len(digits), digits.device)).floor().add(1).clamp(max=parts)
        hidden = hide(counts, parts).view_as(digits)
        loss = self.sub_token_nll(digits, hidden, condition).sum(dim=(1, 2)) * self.parts_per_code / counts
        return TrainingLoss(loss, loss.detach())

    def nll(self, codes: Codes, condition: Condition, seed: int = 0) -> Tensor:
        """As `MaskedPrior.nll`, an upper bound on each code's, `b n`: the mean over all orders of sub-tokens."""
        digits = self.digits(self.sequence(codes, condition))  # b n l
        hidden, weights = hidden_for_nll(digits.flatten(1), self.config.nll_levels, seed)
        total = torch.zeros(digits.shape[:2], device=digits.device)
        for level, weight in zip(hidden.unbind(1), weights.unbind(1), strict=True):
            nll = self.sub_token_nll(digits, level.view_as(digits), condition)
            total = total + weight[:, None] * nll.sum(dim=2)
        return total

    def filling(
        self,
        counts: Sequence[Sequence[int]],
        known: Tensor,
        uniforms: Uniforms,
        draw: Draw,
        choice_temperature: float | None,
    ) -> Fill:
        parts = known.shape[1] * self.parts_per_code
        return SubTokensByLot(self, counts, known, uniforms(parts, CODE_STREAM), uniforms(parts, CHOICE_STREAM), draw)


def worth_of(bases: Sequence[int]) -> list[int]:
    """What a digit of each base is worth in a number, the fastest first."""
    return list(accumulate(bases[:-1], mul, initial=1))


def nll_of_digits(logits: Tensor, digits: Tensor, of_codes: Tensor) -> Tensor:
    """Nats of each of the digits `b n l`, float32, under logits of codes, `b n k`, whose digits are `of_codes`, k l:
    a digit is as probable as all codes together that have it."""
    logits = logits.float()
    every = logits.logsumexp(dim=-1)
    of_each = [
        logits.masked_fill(own[..., None] != table, -math.inf).logsumexp(dim=-1)
        for own, table in zip(digits.unbind(-1), of_codes.unbind(-1), strict=True)
    ]
    return every[..., None] - torch.stack(of_each, dim=-1)


class SubTokensByLot:
    """Each hidden sub-token has its step beforehand, by lot, as `InOrder` has it of codes. Those of one code that come
    at the same step are drawn together, by what they make of a code that is drawn."""

    def __init__(
        self,
        prior: MDMPrime,
        counts: Sequence[Sequence[int]],
        known: Tensor,
        uniforms: Tensor,
        ranks: Tensor,
        draw: Draw,
    ):
        """counts: of the sub-tokens that each step fills, for each sample. known: b n, bool, where no code is hidden.
        uniforms, ranks: uniform numbers in [0, 1), `b n*l`."""
        self.prior = prior
        ends = padded(counts).cumsum(dim=1).to(known.device)  # b steps
        known = known.repeat_interleave(prior.parts_per_code, dim=1)
        order = ranks.masked_fill(known, math.inf).argsort(dim=1).argsort(dim=1)
        size = (-1, prior.parts_per_code)
        self.step_of = torch.searchsorted(ends, order, right=True).unflatten(1, size)  # b n l
        places = self.step_of.shape[1]
        self.most = [min(max(step), places) for step in padded(counts).T.tolist()]  # codes that have any
        self.uniforms = uniforms.unflatten(1, size)
        self.draw = draw

    def __call__(self, step: int, logits: Tensor, sequence: Tensor) -> Tensor:
        now = self.step_of == step
        places = first_places(now.any(dim=-1), self.most[step])  # b m
        # Each number draws once: of the first of a code's sub-tokens that come now.
        numbers = self.uniforms.gather(2, now.int().argmax(dim=-1, keepdim=True))[..., 0].gather(1, places)
        drawn = torch.zeros_like(sequence).scatter(1, places, self.draw(at(logits, places), numbers))
        return self.prior.sequence_of(torch.where(now, self.prior.digits(drawn), self.prior.digits(sequence)))
