"""Re-masking of codes that are filled in already (ReMDM, Wang et al. 2025, arXiv:2503.00307): a masked prior may take
back what it has drawn and draw it anew, knowing more. No training is needed, as the codes that are known at a time have
the same distribution as without.

With the share a_t of codes filled before a step, and a_s after it:

    a filled code  becomes hidden with probability sigma
    a hidden one   stays hidden   with probability (1 - a_s - sigma * a_t) / (1 - a_t)

so that a_s are filled on average, whatever sigma is, from 0 up to min(1, (1 - a_s) / a_t): `most_remasked`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stage2_prior.masked_sampling import Draw
from stage2_prior.sampling_config import SamplingConfig


def hidden_shares(steps: int, share: Callable[[float], float], sampling: SamplingConfig) -> list[float]:
    """Share of the codes that is hidden before each of the steps, and after the last: 1 to 0, `steps + 1`.

    share: of the codes that are hidden when some of the progress (0 to 1) is made. A loop makes none of it from
    `remask_start` to `remask_end` of the steps: `remask_filled` of the codes are filled all that time, and its steps
    only exchange codes for others."""
    start, end = sampling.remasked_steps

    def progress(done: float) -> float:
        if sampling.remask != "loop":
            return done
        halt = progress_of(1 - sampling.loop_filled, share)
        if done <= start:
            return halt * done / start if start else halt
        return halt if done <= end else halt + (1 - halt) * (done - end) / (1 - end)

    return [1.0, *(share(progress(step / steps)) for step in range(1, steps)), 0.0]


def progress_of(hidden: float, share: Callable[[float], float]) -> float:
    """The progress at which a falling `share` is `hidden`, by halving what is in question."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > hidden else (low, middle)
    return high


def most_remasked(before: float, after: float) -> float:
    """The largest chance in which filled codes may become hidden again, of shares hidden before and after a step."""
    return min(1.0, after / (1 - before)) if before < 1 else 1.0


def remasked(sampling: SamplingConfig, step: int, steps: int, before: float, after: float) -> float:
    """sigma of a step, counted from 0; for `confidence` the sum over all codes of an image."""
    start, end = sampling.remasked_steps
    if not start <= step / steps < end:
        return 0.0
    most, rate = most_remasked(before, after), sampling.rate_of_remasking
    # A cap and a loop have a constant rate, as far as it goes; published loops overstep the bound.
    return min(rate, most) if sampling.remask in ("cap", "loop") else rate * most


def stays_hidden(before: float, after: float, sigma: float) -> float:
    """The chance that a hidden code stays so."""
    return max(0.0, (after - sigma * (1 - before)) / before)


def spread_by_confidence(sigma: float, confidence: Tensor) -> Tensor:
    """sigma `b n` of each code: shares of one `sigma` for all codes of an image, the more, the less probable a code
    was when it was filled in (`confidence` b n, its probability; inf where none may be taken back)."""
    shares = (-confidence).softmax(dim=1)
    return sigma * shares.nan_to_num(0.0)  # nan where all are inf


class ReMasking:
    """Each hidden code is filled in by chance and each filled one hidden again by chance, but for the known ones. After
    the last step none is hidden."""

    def __init__(
        self,
        hidden: list[float],
        sampling: SamplingConfig,
        uniforms: Tensor,
        noise: Tensor,
        known: Tensor,
        draw: Draw,
    ):
        """hidden: `hidden_shares`. uniforms, noise: uniform numbers in [0, 1), `b steps n`; the latter decide what is
        filled and what is hidden again. known: b n, bool, codes that stay."""
        self.hidden = hidden
        self.sampling = sampling
        self.uniforms = uniforms
        self.noise = noise
        self.known = known
        self.draw = draw
        self.confidence = torch.full(known.shape, math.inf, device=known.device)

    def __call__(self, step: int, logits: Tensor, sequence: Tensor) -> Tensor:
        before, after, noise = self.hidden[step], self.hidden[step + 1], self.noise[:, step]
        sigma = remasked(self.sampling, step, len(self.hidden) - 1, before, after)
        codes, masked = self.draw(logits, self.uniforms[:, step]), sequence < 0
        if self.sampling.remask == "confidence":
            goes = noise < spread_by_confidence(sigma, self.confidence)
            fills = masked & (noise >= stays_hidden(before, after, 0.0))  # as the published code has it
            certainty = logits.gather(2, codes[..., None])[..., 0] - logits.logsumexp(dim=2)
            self.confidence = self.confidence.masked_fill(goes, math.inf).where(~fills, certainty.exp())
        else:
            goes = noise < sigma
            fills = masked & (noise >= stays_hidden(before, after, sigma))
        hides = goes & ~masked & ~self.known
        return torch.where(fills, codes, sequence.masked_fill(hides, -1))
