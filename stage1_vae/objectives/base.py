"""What every objective is: the loss that a VAE is trained by, made of the terms that its forward pass gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from stage1_vae.objectives.spectral import Regularised
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors.base import LatentShape
from training.data import Mixture
from training.task import Companion, Guard

NO_LABELS = np.zeros(0, dtype=np.int64)


class TrainingFacts(NamedTuple):
    """What objectives need to know of a training besides its batches."""

    images: int  # n, training images
    steps: int  # of the whole training
    latent_shape: LatentShape  # of an image
    generator: tuple[nn.Parameter, ...]  # weights of p(z) and p(x|z)
    labels: np.ndarray = NO_LABELS  # n, int64, of the images, -1 where the class is not known
    batch_size: int = 0  # images of a step; 0: not known
    regularised: Callable[[], Regularised | None] = lambda: None  # of the model as it is at the time of the call


class ObjectiveOutput(NamedTuple):
    loss: Tensor  # scalar with a graph: a mean over images, in nats per image
    metrics: dict[str, Tensor]  # detached scalars, the same names in every step
    companion_losses: Mapping[str, Tensor] = {}  # of the companions of these names that learn in this step
    resting: tuple[nn.Parameter, ...] = ()  # weights of the model that this step leaves as they are


class Objective:
    """Settings and schedules of a loss; what it computes is in free functions of `Terms`.

    Schedules go by the number of the step that `loss` is given, from 0. Nothing here counts.
    """

    best_metric: str = "negative_elbo"  # of a validation, by whose lowest value the best weights are kept
    deterministic: bool = False  # whether validations look at the posteriors' means, not at draws
    companions: dict[str, Companion]  # networks that learn beside the model, by name: training.task.Companion
    guard: Guard | None  # judges validations, where an objective must; it is part of a checkpoint
    reads_weights: str | None = None  # what of it reads weights of the model, besides calling it: training.task.Task
    mixture: Mixture | None = None  # which images have a part of every batch to themselves

    def __init__(self, config: Any, facts: TrainingFacts) -> None:
        self.config, self.facts = config, facts
        self.companions = {}
        self.guard = None

    @property
    def draws(self) -> int:
        """Of the latents of each image in a step, whose noise `loss` takes."""
        return 0 if self.deterministic else int(getattr(self.config, "draws", 1))

    def loss(self, model: nn.Module, images: Tensor, step: int, noise: Tensor | None = None) -> ObjectiveOutput:
        """The loss of a micro-batch of this step.

        model: as the loop has wrapped it (DDP, compile): called with images, and optionally how many draws or their
        noise, k b *shape, it gives Terms. images: b c H W in [-1, 1]. noise: of `draws` draws; None: drawn here.
        """
        raise NotImplementedError

    def validation_figures(self, terms: Terms) -> dict[str, Tensor]:
        """What its guard wants to know of a validation besides what all do, each `b`; by default nothing."""
        return {}
