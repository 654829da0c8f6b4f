"""Exact lookahead: the codes of the step-by-step loop in fewer passes, without a second model.

The uniform number of each sample and place is fixed, and codes come by the inverse CDF. So a code is a function of the
codes before it, and a sequence that this function confirms at every place is the one that the loop draws. Guess some
codes, evaluate them in one pass, keep what is confirmed from the left, and one code more, as all before it are right:

    place     4  5  6  7  8  9
    guessed   3  7  1  1  9  2
    drawn     3  7  4  8  8  2      3, 7 and 4 stand: three codes of one pass
              =  =  !               8, 8, 2 came after a wrong 1: they are the next guesses of their places

This is Jacobi decoding (Song et al. 2021, arXiv:2002.03629; Santilli et al. 2023, arXiv:2305.10427), which common
random numbers make exact for draws too, not for the most probable codes alone. Every pass settles a code at least.

A pass over a window rounds otherwise than a step. Where a uniform number lies so close to a border between two codes
that this might decide, the batch is drawn step by step instead: lookahead never changes a code, and timing alone may
decide whether it is used.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.drawing import draw_and_sure, precise
from stage2_prior.priors.base import AutoregressivePrior
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.stepping import WindowStepper, step_dtype

FIRST_WINDOW = 4  # that is timed against single steps
CLEAR = {2: 0.3, 4: 0.15, 12: 0.0}  # difference between two lengths that so many batches of each show
GAIN = 1.03  # by which the longer one must be faster
REST = 64  # batches until what was found is looked at again, and twice as many each time that it stands
TRIED_ROWS = {"cpu": 64}  # a pass of more rows takes as much longer on this device as it has more: nothing to try
TRIED_ROWS_ELSEWHERE = 512
LOGITS = 2**24  # of a pass at most
REMEMBERED = 32  # sequences, for first guesses


class Drawn(NamedTuple):
    codes: Tensor  # b n
    finite: Tensor  # bool, a scalar: whether all logits were that a code was drawn from
    sure: Tensor  # bool, a scalar: whether no draw lay on the edge of rounding
    passes: Tensor  # int64 b, until a sample was complete


class Pace:
    """How many codes a pass is to ask for, in batches of one kind: 1, a single step, or a window. Two lengths take
    turns, so that what else the machine does meets both, and whole batches are timed. The faster one stays, and where a
    window wins, one of twice its length comes next."""

    def __init__(self, longest: int):
        """longest: window that is tried."""
        self.longest = longest
        self.best = 1
        self.rest, self.rested = REST, 0
        self.used: set[int] = set()
        self.challenge(FIRST_WINDOW)

    def challenge(self, other: int | None) -> None:
        """Begins to time `best` against another length, if there may be one."""
        self.other = other if other is not None and other <= self.longest else None
        self.turn, self.rested = 0, 0
        self.seconds: dict[int, list[float]] = {self.best: [], other or 0: []}

    def length(self) -> int:
        """Of the next batch."""
        return self.best if self.other is None or self.turn % 2 == 0 else self.other

    def note(self, length: int, seconds: float) -> None:
        """What a batch took."""
        if self.other is None:
            self.rested += 1
            if self.rested >= self.rest and self.longest >= FIRST_WINDOW:
                self.challenge(1 if self.best > 1 else FIRST_WINDOW)
            return
        self.turn += 1
        if length not in self.used:  # the first batch of a length allocates what it works in
            self.used.add(length)
            return
        self.seconds[length].append(seconds)
        self.decide(self.other, min(map(len, self.seconds.values())))

    def decide(self, other: int, batches: int) -> None:
        """As soon as it is clear which is faster."""
        if batches < min(CLEAR):
            return
        ratio = statistics.median(self.seconds[self.best]) / statistics.median(self.seconds[other])
        threshold = GAIN if other > self.best else 1 / GAIN
        if abs(ratio / threshold - 1) < min(clear for least, clear in CLEAR.items() if batches >= least):
            return
        if ratio > threshold:
            former, self.best = self.best, other
            self.rest = REST
            self.challenge(2 * other if other > former else None)
        else:
            self.rest *= 2
            self.challenge(None)


class Memory:
    """What is remembered of a prior from batch to batch: how fast it was, and what it drew, for first guesses. Nothing
    of it changes a code."""

    def __init__(self) -> None:
        self.paces: dict[object, Pace] = {}
        self.drawn: Tensor | None = None  # m n

    def guesses(self, uniforms: Tensor, vocabularies: Tensor) -> Tensor:
        """First guesses `b n`: where the uniform numbers `b n` fall among the codes that were drawn at their place
        before, in order; before there are any, among all codes of its grid, vocabularies: n."""
        if self.drawn is None or self.drawn.device != uniforms.device:
            return (uniforms * vocabularies).long()
        ordered = self.drawn.sort(dim=0).values
        return ordered.gather(0, (uniforms * len(ordered)).long())

    def remember(self, codes: Tensor) -> None:
        known = [] if self.drawn is None or self.drawn.device != codes.device else [self.drawn]
        self.drawn = torch.cat([codes, *known])[:REMEMBERED].clone()


MEMORIES: WeakKeyDictionary[AutoregressivePrior, Memory] = WeakKeyDictionary()


def memory_of(prior: AutoregressivePrior) -> Memory:
    return MEMORIES.setdefault(prior, Memory())


def looks_ahead(prior: AutoregressivePrior, sampling: SamplingConfig) -> bool:
    """auto: only in float32 with float64 draws, where rounding is so small that timing cannot change a code."""
    if not prior.takes_windows or sampling.lookahead in ("off", 1):
        return False
    weight = next(prior.parameters())
    exact = step_dtype(weight) == torch.float32 and precise(weight.device) == torch.float64
    exact = exact and sampling.precision is None and torch.get_float32_matmul_precision() == "highest"
    return exact or sampling.lookahead != "auto"


def pace_of(prior: AutoregressivePrior, batch: int, sampling: SamplingConfig, anything_known: bool) -> Pace:
    """That of batches like this one."""
    device = next(prior.parameters()).device
    tried = TRIED_ROWS.get(device.type, TRIED_ROWS_ELSEWHERE) // rows_of(batch, sampling)
    kind = batch, sampling, device, torch.get_num_threads(), anything_known
    return memory_of(prior).paces.setdefault(kind, Pace(min(tried, longest_window(prior, batch, sampling))))


def longest_window(prior: AutoregressivePrior, batch: int, sampling: SamplingConfig) -> int:
    largest = max(grid.vocabulary for grid in prior.code_spec.grids)
    return min(prior.code_spec.codes_per_image, max(1, LOGITS // (rows_of(batch, sampling) * largest)))


def rows_of(batch: int, sampling: SamplingConfig) -> int:
    """Samples, and those without a label that guidance draws beside them."""
    return batch if sampling.guidance == 1 else 2 * batch


def draw_ahead(
    prior: AutoregressivePrior,
    stepper: WindowStepper,
    uniforms: Tensor,
    sampling: SamplingConfig,
    known: Tensor | None,
    length: int,
) -> Drawn:
    """As `draw_in_order`, by a fresh stepper in windows of `length`: the same codes where all draws were sure."""
    memory = memory_of(prior)
    vocabularies = [grid.vocabulary for grid in prior.code_spec.grids for _ in range(grid.size)]
    ahead = Ahead(stepper, uniforms, sampling, known, memory, vocabularies)
    drawn = ahead.walk(length, longest_window(prior, len(uniforms), sampling))
    memory.remember(drawn.codes)
    return drawn


class Ahead:
    """A batch on its way, each sample at its own place."""

    def __init__(
        self,
        stepper: WindowStepper,
        uniforms: Tensor,
        sampling: SamplingConfig,
        known: Tensor | None,
        memory: Memory,
        vocabularies: Sequence[int],
    ):
        """vocabularies: of the grid of each place."""
        self.stepper, self.sampling = stepper, sampling
        (self.batch, self.places), device = uniforms.shape, uniforms.device
        of_place = torch.tensor(vocabularies, device=device)
        guesses = memory.guesses(uniforms, of_place)
        if known is not None:
            guesses = torch.where(known < 0, guesses, known)
        # Windows may reach beyond the last place: there is room for one that begins there.
        self.codes = F.pad(guesses, (1, self.places))  # the code before each place: guessed until it is settled
        self.uniforms = F.pad(uniforms, (0, self.places))
        self.sums = uniforms.new_zeros(self.uniforms.shape)  # of the logits at each place
        self.unsure = torch.zeros(self.uniforms.shape, dtype=torch.bool, device=device)
        self.known: Tensor | None = None
        self.runs: Tensor | None = None  # how many codes in a row are known from each place on
        if known is not None:
            self.known = F.pad(known, (0, self.places), value=-1)
            self.runs = runs_of(self.known >= 0)
        self.no_codes: Tensor | None = None  # n k, numbers that are no codes of a place's grid
        if len(set(vocabularies)) > 1:
            numbers = torch.arange(max(vocabularies), device=device)
            self.no_codes = F.pad(numbers >= of_place[:, None], (0, 0, 0, self.places), value=False)
        self.offsets = torch.arange(self.places, device=device)
        self.done = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.settled = [0] * self.batch  # the same
        self.passes = torch.zeros_like(self.done)

    @torch.inference_mode()
    def walk(self, length: int, most: int) -> Drawn:
        """length: of a window, besides codes that are known. most: that it may have with them."""
        while (least := min(self.settled)) < self.places:
            self.window(min(length + self.run_of_known(), most, self.places - least))
        codes, places = self.codes[:, 1 : self.places + 1], slice(self.places)
        return Drawn(codes, self.sums[:, places].isfinite().all(), ~self.unsure[:, places].any(), self.passes)

    def run_of_known(self) -> int:
        """Codes in a row that are known of all samples that are not complete: they are guessed right."""
        if self.runs is None:
            return 0
        runs = self.runs.gather(1, self.done[:, None]).masked_fill_(self.done[:, None] >= self.places, self.places)
        return int(runs.min())

    def window(self, length: int) -> None:
        alike = len(set(self.settled)) == 1  # samples at the same place need no look-up of their own
        at = self.done[:, None] + self.offsets[:length]  # b w
        part = slice(self.settled[0], self.settled[0] + length) if alike else at
        guessed = taken(self.codes[:, 1:], part).clone()  # what is drawn replaces it
        logits = self.stepper.window(self.done, taken(self.codes, part))
        drawn = self.choose(logits, part, at)
        confirmed = 1 + (drawn == guessed)[:, :-1].cumprod(dim=1).sum(dim=1)
        self.passes += self.done < self.places
        self.done = (self.done + confirmed).clamp_(max=self.places)
        self.settled = self.done.tolist()

    def choose(self, logits: Tensor, part: slice | Tensor, at: Tensor) -> Tensor:
        """Draws the codes at the places `at`, b w, and writes them down."""
        sums = logits.sum(dim=-1)
        no_codes = None if self.no_codes is None else self.no_codes[at]
        if no_codes is not None:
            logits = logits.masked_fill(no_codes, -torch.inf)
        drawn, sure = draw_and_sure(logits, taken(self.uniforms, part), self.sampling)
        if self.known is not None:
            known = taken(self.known, part)
            drawn, sure = torch.where(known < 0, drawn, known), sure | (known >= 0)
        if no_codes is not None:  # of logits that are not finite none of the grid's may have been drawn
            drawn = torch.minimum(drawn, no_codes.shape[-1] - 1 - no_codes.sum(dim=-1))
        put(self.codes[:, 1:], part, drawn)
        put(self.sums, part, sums.to(self.sums.dtype))
        put(self.unsure, part, ~sure)
        return drawn


def taken(of_places: Tensor, part: slice | Tensor) -> Tensor:
    """What stands at the same places of all samples, or at those `b w` of each."""
    return of_places[:, part] if isinstance(part, slice) else of_places.gather(1, part)


def put(of_places: Tensor, part: slice | Tensor, values: Tensor) -> None:
    if isinstance(part, slice):
        of_places[:, part] = values
    else:
        of_places.scatter_(1, part, values)


def runs_of(known: Tensor) -> Tensor:
    """How many places in a row are known from each on, `b n`."""
    places = torch.arange(known.shape[1], device=known.device)
    next_unknown = places.masked_fill(known, known.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return next_unknown - places
