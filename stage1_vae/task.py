"""The task of likelihood VAEs: one step, one validation, one preview."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.model_io import PretrainedModel
from metrics.similarity import psnr
from stage1_vae.binarise import NumberedImages
from stage1_vae.holes import seen_images, seen_pixels
from stage1_vae.model import LikelihoodVAE, NoiseSource
from stage1_vae.objectives.base import Objective
from stage1_vae.objectives.terms import elbo, total_kl
from stage1_vae.pictures import preview
from training.schedules import step_seed
from training.task import Batch, Companion, Guard, StepOutput

VALIDATION_SEED = 0x5EED  # of the noise by which held-out images are judged


class VAETask:
    """training.task.Task of likelihood VAEs. Batches are those of `NumberedImages`.

    Validation, on images that are never trained on, in nats per image: `negative_elbo`, of one draw of each image's
    latents, whose noise is a function of the image's number, and its parts, `log_likelihood` and `kl`;
    `bits_per_dimension`, of the negative ELBO, where images have finitely many values; `psnr` in dB, of what the means
    of the posteriors decode to, for decoders that have a mean image and not a draw in its place. Of images with holes
    all of these are of the pixels that are seen. Of an objective
    without draws there is `negative_log_likelihood` of those means instead of a bound. The weights kept are those of
    the best `Objective.best_metric`.
    """

    def __init__(
        self,
        model: LikelihoodVAE,
        objective: Objective,
        validation_data: NumberedImages,
        *,
        batch_size: int,
        seed: int = 0,
        as_modelled: bool = True,
    ) -> None:
        """batch_size: of a step, over all processes and micro-batches; seed: of the noise of its draws. as_modelled:
        whether images are of the kind that the likelihood is of."""
        self.model: PretrainedModel = model
        self.vae, self.objective, self.validation_data = model, objective, validation_data
        self.best_metric = objective.best_metric
        self.guard: Guard | None = objective.guard
        self.companions: dict[str, Companion] = objective.companions
        self.reads_weights = objective.reads_weights
        self.batch_size, self.seed = batch_size, seed
        self.of_one: NoiseSource | None = None
        self.counts_bits = as_modelled and model.discrete

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        pass

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        images = seen_images(batch)
        output = self.objective.loss(model, images, step, self.noise_of_step(images, batch["draws"], step))
        return StepOutput(output.loss, output.metrics, output.companion_losses, output.resting)

    @torch.no_grad()
    def noise_of_step(self, images: Tensor, draws: Tensor, step: int) -> Tensor | None:
        """Of the latents' draws, k b *shape: as much as the whole step takes, of which these images have their part. So
        it is the same on however many processes and micro-batches. None for an objective without draws."""
        if not self.objective.draws:
            return None
        if self.of_one is None:
            self.of_one = self.vae.noise_source(images[:1])
        generator = torch.Generator(images.device).manual_seed(step_seed(self.seed, step, "latents"))
        noise = self.of_one.noise(self.objective.draws * self.batch_size, generator)
        noise = noise.view(self.objective.draws, self.batch_size, *noise.shape[2:])
        return noise if len(images) == self.batch_size else noise[:, draws % self.batch_size]

    def after_step(self, step: int) -> None:
        self.vae.after_step()

    def health(self) -> dict[str, Tensor]:
        return {}

    def discard_step(self) -> None:
        self.vae.discard_step()

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, LikelihoodVAE)
        images = seen_images(batch)
        if self.objective.deterministic:
            terms = model(images, draws=0)
            metrics = {"negative_log_likelihood": -terms.log_likelihood.mean(0)}
        else:
            terms = model(images, noise=noise_of(model, images, batch["numbers"].tolist(), draws=1))
            bound = elbo(terms)
            metrics = {"negative_elbo": -bound, "log_likelihood": terms.log_likelihood.mean(0), "kl": total_kl(terms)}
            if self.counts_bits:
                numbers = images.shape[1] * seen_pixels(images).sum(dim=(1, 2, 3))
                metrics["bits_per_dimension"] = -bound / (math.log(2) * numbers)
        if not model.mean_is_drawn:
            error = (model.decode(model.encode(images)) - images).square()
            error = error.nanmean(dim=(1, 2, 3)) if "holes" in batch else error.mean(dim=(1, 2, 3))
            metrics["psnr"] = psnr(error)
        return {**metrics, **self.objective.validation_figures(terms)}

    def preview(self, model: nn.Module) -> Tensor | None:
        if not len(self.validation_data):
            return None
        assert isinstance(model, LikelihoodVAE)
        return preview(model, self.validation_data, self.validation_data.labels, self.validation_data.class_names)

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return []


def noise_of(
    model: LikelihoodVAE, images: Tensor, numbers: Sequence[int], draws: int, seed: int = VALIDATION_SEED
) -> Tensor:
    """Noise of `draws` draws of each image's latents, k b *shape, which depends on the image's number and the seed
    alone: the same in whatever batch, on whatever process."""
    alone = model.noise_source(images[:1])
    generator = torch.Generator(images.device)
    parts = [alone.noise(draws, generator.manual_seed(seed * 2**31 + number)) for number in numbers]
    return torch.cat(parts, dim=1)
