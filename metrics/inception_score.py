"""Inception score of a set of made images (Salimans et al. 2016, arXiv:1606.03498): how sure a classifier is of each,
and how many classes there are among them. It sees no real images: one perfect image of each class has the best."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from metrics.statistics import in_float64


class InceptionScore(NamedTuple):
    mean: float  # over splits, 1 to the number of classes
    std: float  # over splits, with their number below the sum, as it was published


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """exp of the mean divergence of an image's classes from those of its split, averaged over splits.

    probabilities: n classes, each row adding up to 1. The images are always shuffled first, by `seed` as
    torch-fidelity shuffles them: split in the order in which they were made, class by class, each split would have few
    classes, and a score of 10 would become one of 2. Raises UserError for fewer images than splits and for rows that
    are no probabilities.
    """
    count = len(probabilities)
    if probabilities.ndim != 2 or not 1 <= splits <= count:
        raise UserError(
            f"probabilities of shape {tuple(probabilities.shape)} in {splits} splits, expected (images, classes) and 1 "
            f"to {count} splits; give fewer, or more images"
        )
    p = in_float64(probabilities)
    if not bool(((p >= 0).all(dim=1) & ((p.sum(dim=1) - 1).abs() < 1e-3)).all()):
        raise UserError("these are no probabilities: they are negative or do not add up to 1; give those, not logits")
    p = p[torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(p.device)]
    scores = []
    for split in range(splits):
        part = p[split * count // splits : (split + 1) * count // splits]
        marginal = part.mean(dim=0)
        divergence = torch.xlogy(part, part).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(float(divergence.exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
