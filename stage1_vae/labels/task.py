"""The task of likelihood VAEs that know classes: the same as of others, but steps see labels, and validations tell how
often the class is told right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from images.datasets import to_float
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.objectives.semi_supervised import SemiSupervised
from stage1_vae.task import VAETask
from training.task import Batch, StepOutput


class SemiSupervisedTask(VAETask):
    """training.task.Task of `LabelledVAE`.

    Validation takes no notice of labels in the figures of all VAEs: `negative_elbo` is U(x). `accuracy` is the share of
    images whose most probable class by q(y|x) is theirs, among held-out images with a label, where there are any. The
    weights kept are those of the lowest `negative_elbo`: labels of held-out images would be many more than those of
    training.
    """

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        assert isinstance(self.objective, SemiSupervised)
        images = to_float(batch["images"])
        noise = self.noise_of_step(images, batch["draws"], step)
        output = self.objective.loss(model, images, step, noise, batch["labels"])
        return StepOutput(output.loss, output.metrics)

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, LabelledVAE)
        metrics = super().validate(model, batch)
        known = int((self.validation_data.labels >= 0).sum())
        if not known:
            return metrics
        labels = batch["labels"]
        right = model.class_log_probabilities(to_float(batch["images"])).argmax(dim=-1) == labels
        # The mean over all held-out images is that over those with a label.
        weights = torch.where(labels >= 0, len(self.validation_data) / known, 0.0)
        return {**metrics, "accuracy": right * weights}
