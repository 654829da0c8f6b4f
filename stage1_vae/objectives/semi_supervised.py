"""The objective of semi-supervised models: Kingma et al. 2014 (arXiv:1406.5298, equations 8 and 9), for each image.

    loss = 1/N (sum over labelled L(x, y) + sum over unlabelled U(x)) + alpha * mean over labelled of -log q(y|x)

of N training images, which is equation 9 divided by N: the paper's alpha = 0.1 N is 0.1 here. Batches hold a fixed
share of labelled images, of which uniform ones would hardly ever hold one; weights make the loss an estimate of the
same sums whatever the share is. Every image adds to it by itself, so that micro-batches are parts of one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, check_fields
from stage1_vae.objectives.base import Objective, ObjectiveOutput, TrainingFacts
from stage1_vae.objectives.terms import Terms, elbo
from training.data import Mixture


@dataclass(frozen=True, kw_only=True)
class SemiSupervisedConfig:
    """Bounds of labelled and unlabelled images, and the classifier's own loss."""

    kind: Literal["semi_supervised"] = "semi_supervised"
    draws: int = 1  # of the latents of each image
    alpha: float = 0.1  # weight of the classifier's loss, in nats per labelled image, beside bounds per image
    labelled_share: float = 0.5  # of each batch, which has no effect on what is estimated

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("draws", self.draws >= 1, "at least 1"),
                ("alpha", self.alpha >= 0, "0 or more; 0.1 is the paper's 0.1 N"),
                ("labelled_share", 0 < self.labelled_share < 1, "a share of each batch above 0 and below 1"),
            ],
        )


class SemiSupervised(Objective):
    config: SemiSupervisedConfig

    def __init__(self, config: SemiSupervisedConfig, facts: TrainingFacts) -> None:
        super().__init__(config, facts)
        self.mixture = mixture_of(facts.labels, config.labelled_share)
        total, known = len(facts.labels), int((facts.labels >= 0).sum())
        # By how much less often an image of either kind is in a batch than in the data, and of how many of them a
        # batch's mean is.
        self.weight, self.of_kind = {True: 1.0, False: 0.0}, {True: 1.0, False: 0.0}
        if self.mixture is not None:
            share = self.mixture.count(facts.batch_size) / facts.batch_size
            self.of_kind = {True: 1 / share, False: 1 / (1 - share)}
            self.weight = {kind: self.of_kind[kind] * n / total for kind, n in ((True, known), (False, total - known))}

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        step: int,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ObjectiveOutput:
        """labels: b, int64, -1 where the class is not known."""
        assert labels is not None, "the task of labelled models gives them"
        terms: Terms = model(images, self.config.draws, noise, labels=labels)
        known = labels >= 0
        bound, of_label = elbo(terms), -terms.log_posterior[0].mean(0)[:, 0]

        def mean(values: Tensor, weights: dict[bool, float]) -> Tensor:
            return (values * torch.where(known, weights[True], weights[False])).mean()

        labelled = {True: self.of_kind[True], False: 0.0}
        classification = mean(of_label, labelled)
        found = {"classification": classification, "labelled_elbo": mean(bound, labelled)}
        if self.mixture is not None:
            found["unlabelled_elbo"] = mean(bound, {True: 0.0, False: self.of_kind[False]})
        loss = self.config.alpha * classification - mean(bound, self.weight)
        return ObjectiveOutput(loss, {name: value.detach() for name, value in found.items()})


def mixture_of(labels: np.ndarray, share: float) -> Mixture | None:
    """How batches of images with these labels, n, -1 where they are not known, are mixed; None where all are known.
    Raises UserError where none is."""
    known = labels >= 0
    if not known.any():
        raise UserError(
            "the training images have no classes, expected some in folders of classes and the others in one called "
            "unlabelled, or a set with labels and data.labels_per_class"
        )
    return None if known.all() else Mixture(known, share)
