"""Learning rate and random seed as functions of the step alone: nothing to save, nothing to restore."""

from __future__ import annotations

import hashlib
import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    steps: int,
    schedule: Literal["cosine", "constant"],
    final_factor: float,
) -> float:
    """Learning rate of step `step`, counted from 0: a linear warm-up to `peak`, then constant, or half a
    cosine (Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts) that reaches `final_factor * peak`
    as the run ends."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_factor + (1 - final_factor) * cosine)


def step_seed(seed: int, step: int, who: int | str) -> int:
    """Seed of the random numbers (dropout and the like) of one step, for a process or for all of them
    together. Hashed: neighbouring seeds, steps and processes share nothing."""
    digest = hashlib.sha256(f"{seed} {step} {who}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds
