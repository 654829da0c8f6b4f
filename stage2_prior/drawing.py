"""From logits to a choice: temperature, top-k and top-p; the same codes whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from stage2_prior.sampling_config import SamplingConfig

EDGE = 3e-6  # of the probability: as far as rounding has been seen to move the border between two codes

Seed = int | Sequence[int]
"""Of all samples of a batch, or of each."""


def draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """Codes `b m`, int64, from logits `b m k` and uniform numbers `b m`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return inverse_cdf(probabilities(logits.flatten(0, 1), sampling), uniforms.flatten()).view(uniforms.shape)


def draw_and_sure(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Codes as `draw`, `b m`, and whether each is sure, bool `b m`: that logits which differ by no more than float32
    rounds would have drawn the same one."""
    if sampling.temperature == 0:
        first, second = (logits.topk(min(2, logits.shape[-1]), dim=-1).values[..., place] for place in (0, -1))
        apart = first - second > EDGE * first.abs().clamp(min=1)
        return logits.argmax(dim=-1), apart | (logits.shape[-1] == 1)
    cumulative = probabilities(logits.flatten(0, 1), sampling).cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = uniforms.flatten()[:, None] * total
    edges = torch.cat([targets - EDGE, targets, targets + EDGE], dim=1)
    found = torch.searchsorted(cumulative, edges, right=True).clamp_(max=logits.shape[-1] - 1)
    before, drawn, after = found.view(*uniforms.shape, 3).unbind(-1)
    return drawn, before == after


def uniforms_of(seed: Seed, indices: Sequence[int], numbers: int, device: torch.device, stream: int = 0) -> Tensor:
    """`noise` on the device, `b n`, in the most precise type that it has."""
    exact = precise(device)
    # Rounded to float32 a number could become 1, beyond the last code.
    return noise(seed, indices, numbers, stream).to(exact).clamp(max=1 - torch.finfo(exact).eps / 2).to(device)


def noise(seed: Seed, indices: Sequence[int], positions: int, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), `b n` float64: row j is a function of its seed and `indices[j]` alone, through the
    counter-based generator Philox (Salmon et al. 2011), which NumPy keeps the same from version to version. Codes are
    drawn with stream 0; other decisions about the same samples take numbers of other streams. Raises UserError for a
    seed or an index that is not in [0, 2**64)."""
    seeds = seed if isinstance(seed, Sequence) else [seed] * len(indices)
    for name, numbers in (("seed", seeds), ("sample index", indices)):
        for number in numbers:
            if not 0 <= number < 2**64:
                raise UserError(f"{name}={number}, expected 0 to {2**64 - 1}")
    start = [0, 0, 0, stream]
    rows = [
        np.random.Generator(np.random.Philox(counter=start, key=np.array([own, index], dtype=np.uint64))).random(
            positions
        )
        for own, index in zip(seeds, indices, strict=True)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, positions, dtype=torch.float64)


def probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution `b k` that `sampling` draws from: temperature, then top-k, top-p and min-p. Float64 where the
    device has it. Codes as probable as the last one admitted are admitted too, so that the choice between equals does
    not depend on how a sort breaks the tie. Temperature 0 is one-hot."""
    scaled = logits.to(precise(logits.device))
    if sampling.temperature == 0:
        return torch.zeros_like(scaled).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        # The largest first becomes 0: a tiny temperature must not turn it into an infinity.
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / sampling.temperature
    candidates = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if candidates < logits.shape[-1]:
        last = logits.topk(candidates, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(logits < last, -math.inf)
    shares = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        shares = within_top_p(shares, candidates, sampling.top_p)
    if sampling.min_p > 0:
        floor = sampling.min_p * shares.amax(dim=-1, keepdim=True)
        shares = shares.masked_fill(shares < floor, 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares


def within_top_p(shares: Tensor, candidates: int, top_p: float) -> Tensor:
    """The fewest codes that hold `top_p` of the probability, `b k`; at most `candidates` have any."""
    descending = shares.topk(candidates, dim=-1).values
    before = descending.cumsum(dim=-1) - descending  # probability of all codes more probable than this one
    last = descending.masked_fill(before >= top_p, math.inf).amin(dim=-1, keepdim=True)
    shares = shares.masked_fill(shares < last, 0.0)
    return shares / shares.sum(dim=-1, keepdim=True)


def inverse_cdf(shares: Tensor, uniforms: Tensor) -> Tensor:
    """Codes, int64 `b`: those in whose slices of [0, 1) the uniform numbers `b` fall, when the codes' shares `b k` are
    laid side by side in the order of the codebook. Rounding errors of the logits move the borders of the slices by
    about as much, so a choice changes only where a number falls that close to a border."""
    cumulative = shares.cumsum(dim=-1)
    # Times the last entry, which rounding leaves next to 1: so no number can fall beyond the last code.
    targets = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return chosen.clamp_(max=shares.shape[-1] - 1)  # only shares that are not finite lead beyond


def precise(device: torch.device) -> torch.dtype:
    """Float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
