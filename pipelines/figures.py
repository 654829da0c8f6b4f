"""Figures of images and codes: what evaluation, diagnosis and reports measure."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codes.spec import Codes
from stage2_prior.drawing import precise
from stage2_prior.priors import Prior

SSIM_WINDOW = 11  # pixels along each side
FEW = 100  # images below which figures come with a caution


def decibels(original: np.ndarray, reconstruction: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of 8-bit images; None where they are equal."""
    error = np.mean((original.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(decoded: Tensor, images: Tensor) -> Tensor | None:
    """Structural similarity of each image, `b`, at most 1, for images `b c H W` in [-1, 1] (Wang et al. 2004: windows
    of 11x11, with Gaussian weights of standard deviation 1.5; around every pixel, the image mirrored at its border, as
    torchmetrics has it). None for images smaller than a window."""
    if min(images.shape[-2:]) < SSIM_WINDOW:
        return None
    distances = torch.arange(SSIM_WINDOW, dtype=torch.float32, device=images.device) - SSIM_WINDOW // 2
    weights = torch.softmax(-(distances**2) / (2 * 1.5**2), dim=0)
    x, y = (F.pad(pixels.float(), 4 * [SSIM_WINDOW // 2], mode="reflect") for pixels in (decoded, images))
    b, c = x.shape[:2]
    each = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2).unsqueeze(1)
    means = F.conv2d(F.conv2d(each, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.view(5, b, c, *means.shape[2:])
    variance_x, variance_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    luminance, contrast = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # constants of the paper; pixels span 2
    similarity = (2 * mean_x * mean_y + luminance) / (mean_x**2 + mean_y**2 + luminance)
    similarity = similarity * (2 * (mean_xy - mean_x * mean_y) + contrast) / (variance_x + variance_y + contrast)
    return similarity.mean(dim=(1, 2, 3))


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
