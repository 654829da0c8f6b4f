"""How a masked prior fills in the codes of an image: some at each step, from logits that know all those filled before.

What `walk` is for priors that go by an order (stepping.py), `unmask` is for those that do not. They differ in which
codes a step fills: `SurestFirst` and `InOrder` are two ways, `filling_by` knows them by their names. A prior has one of
its own (`MaskedPrior.filling`), and any other may be asked for. A third, which takes codes back, is in remasking.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from codes.spec import Grid
from stage2_prior.halton import halton_ranks
from stage2_prior.sampling_config import Order

Draw = Callable[[Tensor, Tensor], Tensor]
"""(logits b m k, uniform numbers b m) -> codes b m"""

Uniforms = Callable[[int, int], Tensor]
"""(how many, stream) -> uniform numbers in [0, 1), `b` of so many: those of a sample are the same in any batch."""

CODE_STREAM = 0  # of the numbers that codes are drawn with
CHOICE_STREAM = 2  # of those that decide which codes come first


def cosine_share(progress: float) -> float:
    """Share of the codes that are hidden when `progress` (0 to 1) of the steps are done (Chang et al. 2022,
    arXiv:2202.04200): few are filled at first, while little is known, and many at last."""
    return math.cos(math.pi / 2 * progress)


def linear_share(progress: float) -> float:
    """As many at every step."""
    return 1 - progress


def arccos_share(progress: float) -> float:
    """Between the two (Besnier et al. 2025, arXiv:2503.17076): nearly as many at every step, but most at the last."""
    return math.acos(progress) / (math.pi / 2)


SHARES: dict[str, Callable[[float], float]] = {"cosine": cosine_share, "linear": linear_share, "arccos": arccos_share}
"""By `SamplingConfig.mask_schedule`."""


def codes_per_step(hidden: int, steps: int, share: Callable[[float], float]) -> list[int]:
    """How many of `hidden` codes each step fills, at least one: their sum is `hidden`. There are fewer steps than
    `steps` where there are fewer codes."""
    steps = min(steps, hidden)
    left = [hidden]
    for step in range(1, steps + 1):
        left.append(max(steps - step, min(left[-1] - 1, math.floor(hidden * share(step / steps)))))
    return [before - after for before, after in pairwise(left)]


class Fill(Protocol):
    def __call__(self, step: int, logits: Tensor, sequence: Tensor) -> Tensor:
        """The sequence `b n` with the codes of this step filled in, given `logits` b n k of all its places."""
        ...


@torch.inference_mode()
def unmask(sequence: Tensor, steps: int, logits_of: Callable[[int, Tensor], Tensor], fill: Fill) -> Tensor:
    """A `sequence` b n, -1 where a code is hidden, with all of them filled in; the others stay. One call of
    `logits_of(step, sequence) -> b n k` a step."""
    for step in range(steps):
        sequence = fill(step, logits_of(step, sequence), sequence)
    return sequence


def log_probability(logits: Tensor, codes: Tensor) -> Tensor:
    """Of codes `b m`, given logits b m k."""
    return logits.gather(2, codes[..., None])[..., 0] - logits.logsumexp(dim=2)


def negative_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """In nats, of what each place may become, `b m`, whatever code was drawn."""
    return -torch.special.entr(logits.softmax(dim=2)).sum(dim=2)


class SurestFirst:
    """Draws a code for every hidden place and keeps the surest ones. Their certainty, the logarithm of a code's
    probability unless another is given, has Gumbel noise added, which shrinks to nothing at the last step: without it
    the samples would be much alike."""

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        uniforms: Tensor,
        noise: Tensor,
        temperature: float,
        draw: Draw,
        certainty: Callable[[Tensor, Tensor], Tensor] = log_probability,
    ):
        """counts: of the codes that each step fills, for each sample (`codes_per_step`). uniforms, noise: uniform
        numbers in [0, 1), `b steps n`. temperature: of the Gumbel noise before the first step. certainty: (logits
        b m k, codes b m) -> b m."""
        self.counts = padded(counts).to(uniforms.device)  # b steps
        self.most = [max(step) for step in padded(counts).T.tolist()]
        hidden = padded(counts).flip(1).cumsum(1).flip(1)  # b steps, before each step
        self.hidden = [max(step) for step in hidden.T.tolist()]
        self.uniforms = uniforms
        left = [[1 - (step + 1) / len(row) for step in range(len(row))] for row in counts]
        # A uniform number may be 0, whose logarithm is not finite.
        gumbel = -(-noise.clamp(min=2.0**-60).log()).log()
        self.noise = temperature * padded(left).to(noise)[..., None] * gumbel
        self.draw = draw
        self.certainty = certainty

    def __call__(self, step: int, logits: Tensor, sequence: Tensor) -> Tensor:
        places = first_places(sequence < 0, self.hidden[step])  # b m
        here = at(logits, places)
        codes = self.draw(here, self.uniforms[:, step].gather(1, places))
        certainty = self.certainty(here, codes) + self.noise[:, step].gather(1, places)
        certainty = certainty.masked_fill(sequence.gather(1, places) >= 0, -math.inf)
        surest = certainty.topk(self.most[step]).indices
        chosen = torch.arange(self.most[step], device=places.device) < self.counts[:, step, None]
        return filled(sequence, places.gather(1, surest), codes.gather(1, surest), chosen)


class InOrder:
    """Each hidden place has its step beforehand, whatever the logits. By random numbers: the reverse of hiding codes at
    random times, with their number at each step fixed to its mean."""

    def __init__(self, counts: Sequence[Sequence[int]], uniforms: Tensor, ranks: Tensor, known: Tensor, draw: Draw):
        """counts: as for `SurestFirst`. uniforms: uniform numbers in [0, 1), `b n`. ranks: `b n`, floats; of the hidden
        places the one with the least comes first. known: b n, bool, where no code is hidden."""
        ends = padded(counts).cumsum(dim=1).to(known.device)  # b steps
        order = ranks.masked_fill(known, math.inf).argsort(dim=1).argsort(dim=1)
        self.step_of = torch.searchsorted(ends, order, right=True)  # b n; known places come behind the last
        self.most = [max(step) for step in padded(counts).T.tolist()]
        self.uniforms = uniforms
        self.draw = draw

    def __call__(self, step: int, logits: Tensor, sequence: Tensor) -> Tensor:
        now = self.step_of == step
        places = first_places(now, self.most[step])
        codes = self.draw(at(logits, places), self.uniforms.gather(1, places))
        return filled(sequence, places, codes, now.gather(1, places))


def filling_by(
    order: Order,
    counts: Sequence[Sequence[int]],
    known: Tensor,
    grids: Sequence[Grid],
    uniforms: Uniforms,
    draw: Draw,
    choice_temperature: float,
) -> Fill:
    """The way of an order: the first three arguments as for `InOrder`, the last as `SurestFirst` takes it. grids: whose
    codes the sequence holds."""
    positions = known.shape[1]
    if order in ("random", "halton"):
        codes = uniforms(positions, CODE_STREAM)
        if order == "random":
            return InOrder(counts, codes, uniforms(positions, CHOICE_STREAM), known, draw)
        return InOrder(counts, codes, halton_ranks(grids).to(codes).expand_as(codes), known, draw)
    steps = max(map(len, counts))
    codes, choice = (
        uniforms(steps * positions, stream).unflatten(1, (steps, positions)) for stream in (CODE_STREAM, CHOICE_STREAM)
    )
    certainty = log_probability if order == "confidence" else negative_entropy
    return SurestFirst(counts, codes, choice, choice_temperature, draw, certainty)


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of different lengths as one tensor, `b steps`, with zeros behind the shorter ones."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def first_places(wanted: Tensor, count: int) -> Tensor:
    """Places that are `wanted` (b n, bool), `b count`, as far as there are so many, then others. Like a mask, but of
    the same shape whatever is in it: a device need not wait for it."""
    return wanted.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def at(logits: Tensor, places: Tensor) -> Tensor:
    """`b n k` at places b m: `b m k`"""
    return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))


def filled(sequence: Tensor, places: Tensor, codes: Tensor, chosen: Tensor) -> Tensor:
    """The sequence with `codes` at `places` (each b m) where they are `chosen`."""
    return sequence.scatter(1, places, torch.where(chosen, codes, sequence.gather(1, places)))
