"""Figures of images and codes: what evaluation, diagnosis and reports measure."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from codes.spec import Codes
from stage2_prior.priors import Prior
from stage2_prior.sampling import precise


def decibels(original: np.ndarray, reconstruction: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of 8-bit images; None where they are equal."""
    error = np.mean((original.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(decoded: Tensor, images: Tensor) -> Tensor | None:
    """Structural similarity of each image, `b`; None without torchmetrics, or for images smaller than its window."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    if min(images.shape[-2:]) < 11:
        return None
    similarity = structural_similarity_index_measure(decoded, images, data_range=2.0, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity


def bits_of_codes(prior: Prior, codes: Codes, labels: Tensor) -> tuple[Tensor, ...]:
    """Bits of each code under the prior, one `b h w` for each grid. labels: `b`, below 0 where there is none."""
    nll = prior.nll(codes, prior.condition_of(labels))
    return prior.grids_of(nll.to(precise(nll.device)) / math.log(2))


def entropy(counts: Tensor) -> float:
    """Bits of one draw with these frequencies, `k`."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum())
