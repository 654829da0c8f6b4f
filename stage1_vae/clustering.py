"""Which cluster of its prior a VAE sorts images into, and how far clusters agree with classes that it never saw."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vae.model import LikelihoodVAE
from stage1_vae.priors import ClusteredPrior
from stage1_vae.vae import VAE


class Agreement(NamedTuple):
    """Of the clusters of n images with their classes, each from 0 to 1."""

    accuracy: float  # of the one-to-one matching of clusters and classes that is the best (Kuhn 1955)
    purity: float  # where each cluster counts as the class that is the most frequent in it
    matched: dict[int, int]  # the class that each cluster is matched with; clusters beyond the classes are not there


def prior_of_clusters(model: LikelihoodVAE) -> ClusteredPrior:
    """Raises UserError for a model without clusters."""
    if not isinstance(model, VAE) or not isinstance(model.prior, ClusteredPrior):
        kind = model.prior.kind if isinstance(model, VAE) and hasattr(model.prior, "kind") else model.kind
        raise UserError(
            f"this model sorts nothing into clusters ({kind}); train one with --model.prior.kind gaussian_mixture or "
            "clusters, such as the recipe mnist_vade"
        )
    return model.prior


@torch.inference_mode()
def cluster_probabilities(model: LikelihoodVAE, images: Tensor) -> Tensor:
    """p(y|z) at the mean of q(z|x): b c H W in [-1, 1] -> b K. Raises UserError for a model without clusters."""
    prior = prior_of_clusters(model)
    return prior.cluster_log_probabilities(model.encode(images)).exp()


def agreement(clusters: np.ndarray, labels: np.ndarray, count: int) -> Agreement:
    """clusters, labels: n whole numbers each, clusters below `count`. Raises UserError for no images."""
    from scipy.optimize import linear_sum_assignment

    if not len(labels):
        raise UserError("got no images with classes, expected at least one")
    classes, numbers = np.unique(labels, return_inverse=True)
    together = np.zeros((count, len(classes)), dtype=np.int64)
    np.add.at(together, (clusters, numbers), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    return Agreement(
        accuracy=float(together[rows, columns].sum()) / len(labels),
        purity=float(together.max(axis=1).sum()) / len(labels),
        matched={int(row): int(classes[column]) for row, column in zip(rows, columns, strict=True)},
    )
