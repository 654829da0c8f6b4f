"""Figures of images and codes: what evaluation, diagnosis and reports measure."""

from __future__ import annotations

import math

from torch import Tensor

from codes.spec import Codes
from stage2_prior.drawing import precise
from stage2_prior.priors import Prior

FEW = 100  # images below which figures come with a caution


def bits_of_codes(prior: Prior, codes: Codes, labels: Tensor, given: Codes | None = None) -> tuple[Tensor, ...]:
    """Bits of each code under the prior, one `b h w` for each grid. labels: `b`, below 0 where there is none; given:
    the codes that a prior of given codes goes by."""
    nll = prior.nll(codes, prior.condition_of(labels, given))
    return prior.grids_of(nll.to(precise(nll.device)) / math.log(2))


def training_shares(counts: Tensor) -> Tensor:
    """Probability of each code, `k` float64, that occurred so often, `k`, in training images. One that never did may
    occur in another image: it counts as half an occurrence, and in a large codebook as less, so that all of those
    together count for half an occurrence of each code that did."""
    unseen = counts == 0
    each = 0.5 * min(1.0, float((~unseen).sum()) / max(1, int(unseen.sum())))
    filled = counts.double().masked_fill(unseen, each or 1.0)
    return filled / filled.sum()


def frequency_bits(counts: Tensor, training: Tensor) -> float:
    """Bits per code, for codes that occurred so often, `k`, of a prior that knows only how frequent each is in training
    images, where it occurred `training` times: their cross-entropy."""
    occurring = counts > 0
    return float(-(counts[occurring] * training_shares(training)[occurring].log2()).sum() / counts.sum())


def entropy(counts: Tensor) -> float:
    """Bits per code of a prior that knows the frequencies of the codes, estimated from codes that occurred so often,
    `k`. The entropy of the counts themselves is too low where codes are few: they fit their own frequencies best. To it
    comes the expected difference (Miller 1955), which is still too little for fewer codes than entries of the codebook;
    no more than log2 k."""
    total, seen = counts.sum(), counts[counts > 0]
    shares = seen.double() / total
    corrected = -(shares * shares.log2()).sum() + (len(seen) - 1) / (2 * math.log(2) * total)
    return min(float(corrected), math.log2(len(counts)))


def standard_error(values: Tensor) -> float:
    """By how much the mean of as many other images would differ, for one number an image; infinite for a single one."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
