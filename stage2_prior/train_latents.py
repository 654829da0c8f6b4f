"""The stage-two task over latents: a prior learns where those of encoded images lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codes.latents import LatentDataset
from common.draws import normal_like
from common.errors import UserError
from common.model_io import PretrainedModel, load_pretrained
from common.short_repr import changes
from common.starting import take_weights
from stage2_prior.latents import LATENT_PRIORS, LatentPriorModel, LatentPriorModelConfig
from stage2_prior.train import STAGE
from training.loop import FitResult, TrainConfig, fit
from training.previews import preview_rows
from training.run_folder import RunFacts, check_stage, defaults_of, has_begun
from training.schedules import step_seed
from training.task import Batch, Companion, Evaluation, Guard, StepOutput

VALIDATION_SEED = 0x5EED  # of the noise by which held-out images are judged
PREVIEW_SEED = 0
EVALUATED_AT_ONCE = 64  # images
LOOKED_AT = 2**27  # numbers of training latents, at most, that a prior sees before the first step


@dataclass(frozen=True, kw_only=True)
class Stage2LatentConfig:
    """One complete run of a prior over latents: a prior, latents, and how to train."""

    model: LatentPriorModelConfig
    train: TrainConfig
    codes: str | None = None  # folder of latent shards that `zellige encode` wrote of a VAE
    draws: bool = True  # train on draws of each image's posterior, anew at each step; false: on its mean
    decoder: str | None = None  # VAE that made the latents, run or model folder: previews show samples as images
    start_from: str | None = None  # run or model folder of a prior of this kind whose weights this one begins with
    # The rest comes from the latent shards and is recorded in the run; a value given here must agree with them.
    latents: str | None = None  # such as `20 latents (28x28x1 images)`
    stage1_fingerprint: str | None = None  # of the VAE that made the latents

    __repr__ = changes

    def resolved(self, latents: LatentDataset) -> Stage2LatentConfig:
        """This config with the facts of the latents filled in. Raises UserError where it says otherwise."""
        if self.draws and not latents.latent_spec.scales:
            raise UserError(
                f"draws=true, but {latents.folder} holds the means of posteriors alone, which are no diagonal "
                "Gaussians; give --draws false"
            )
        found: dict[str, Any] = {
            "latents": latents.latent_spec.describe(),
            "stage1_fingerprint": latents.stage1_fingerprint,
        }
        for name, value in found.items():
            expected = getattr(self, name)
            if expected is not None and expected != value:
                raise UserError(
                    f"{name} is {expected} in the config and {value} in the latents of {latents.folder}; leave {name} "
                    "out of the config, or name other latents"
                )
        return replace(self, codes=str(latents.folder), **found)


DrawLatents = Callable[[Sequence[Tensor], Sequence[str]], Tensor]
"""Makes a picture, c H W in [-1, 1], of rows of latents, `b *shape` each, with a name for each row."""


JudgeLatents = Callable[[int, Callable[[int], Tensor], Callable[[int], Tensor]], dict[str, float]]
"""As `JudgeCodes`, of latents, `b *shape`."""


class Stage2LatentTask:
    """training.task.Task of priors over latents. Batches are those of `LatentDataset`.

    Validation, on images that neither stage has trained on, in nats per image: `nll`, the negative log-density of
    their latents, or what lies above it where the prior knows only a bound; and `gain`, by how much it is lower than
    that of N(0, I). Where that was the prior of the VAE, its ELBO gains as much on the average.
    """

    best_metric = "nll"

    def __init__(
        self,
        model: LatentPriorModel,
        training: LatentDataset,
        validation: LatentDataset,
        draws: bool,
        draw: DrawLatents | None = None,
    ) -> None:
        """draws: whether it learns draws of posteriors, or their means. draw: for previews."""
        self.model: PretrainedModel = model
        self.companions: dict[str, Companion] = {}
        self.guard: Guard | None = None
        self.prior, self.training, self.validation = model, training, validation
        self.draws, self.draw = draws, draw
        self.started = False  # whether the prior has the weights of another, and needs no latents to begin with

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        if self.started:
            return
        device = next(self.prior.parameters()).device
        mean, variance, latents = look_at(self.training, self.draws)
        self.prior.start(mean.to(device), variance.to(device), latents.to(device))

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        noise = normal_like(batch["mean"]) if self.draws else None
        loss = model(latents_of(batch, noise)).mean()
        return StepOutput(loss, {"nll": loss.detach()})

    def after_step(self, step: int) -> None:
        self.prior.update()

    def health(self) -> dict[str, Tensor]:
        return {}

    def discard_step(self) -> None:
        self.prior.forget()

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, LatentPriorModel)
        latents = latents_of(batch, noise_of(batch) if self.draws else None)
        nll = -model.log_density(latents)
        standard = (0.5 * latents.square() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        return {"nll": nll, "gain": standard - nll}

    def preview(self, model: nn.Module) -> Tensor | None:
        """Samples, drawn with the same noise in every preview, below held-out images. None without a decoder."""
        if self.draw is None or not len(self.validation):
            return None
        assert isinstance(model, LatentPriorModel)
        device, rows, names = next(model.parameters()).device, list[Tensor](), list[str]()
        generator = torch.Generator(device).manual_seed(PREVIEW_SEED)
        for row in preview_rows(self.validation.labels):
            rows += [self.validation.fetch(row, row)["mean"].to(device), model.sample(len(row), generator)]
            names += ["held out", "sampled"]
        return self.draw(rows, names)

    def evaluation(self, images: int, judge: JudgeLatents) -> Evaluation:
        """Of as many samples as there are held-out images, at most `images`, drawn with the same noise at every step,
        beside what is decoded of their means."""
        count = min(images, len(self.validation))
        chosen = [i * len(self.validation) // count for i in range(count)]
        batches = [chosen[start : start + EVALUATED_AT_ONCE] for start in range(0, count, EVALUATED_AT_ONCE)]

        def evaluate(model: LatentPriorModel) -> dict[str, float]:
            device = next(model.parameters()).device

            def real(number: int) -> Tensor:
                mean: Tensor = self.validation.fetch(batches[number], batches[number])["mean"]
                return mean.to(device)

            def drawn(number: int) -> Tensor:
                generator = torch.Generator(device).manual_seed(step_seed(PREVIEW_SEED, number, "evaluation"))
                return model.sample(len(batches[number]), generator)

            return judge(len(batches), real, drawn)

        return evaluate

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return []


def latents_of(batch: Batch, noise: Tensor | None) -> Tensor:
    """b *shape: of each image's posterior the draw that standard normal noise makes, b *shape, or the mean."""
    mean: Tensor = batch["mean"]
    return mean if noise is None else mean + batch["log_scale"].exp() * noise


def noise_of(batch: Batch) -> Tensor:
    """Standard normal, b *shape, which depends on each image's number alone: the same in whatever batch."""
    mean = batch["mean"]
    generator = torch.Generator(mean.device)
    return torch.stack(
        [
            torch.randn(mean.shape[1:], device=mean.device, generator=generator.manual_seed(VALIDATION_SEED + number))
            for number in batch["numbers"].tolist()
        ]
    )


def look_at(training: LatentDataset, draws: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance, d each, of every number of the latents, and latents n *shape, of training images from all over
    the set; drawn by the global generator."""
    spec = training.latent_spec
    count = min(len(training), max(1, LOOKED_AT // spec.size))
    indices = [i * len(training) // count for i in range(count)]
    found = map(torch.from_numpy, training.rows(indices, spec.names))
    batch = dict(zip(spec.names, found, strict=True))
    means = batch["mean"].flatten(1).double()
    mean, variance = means.mean(0), means.var(0, correction=0)
    if not draws:
        return mean, variance, batch["mean"]
    own = (2 * batch["log_scale"].flatten(1).double()).exp().mean(0)
    return mean, variance + own, latents_of(batch, torch.randn_like(batch["mean"]))


def train_latents(
    config: Stage2LatentConfig,
    codes: Path,
    run: Path,
    draw: DrawLatents | None = None,
    judge: JudgeLatents | None = None,
    notes: tuple[str, ...] = (),
) -> FitResult:
    """Trains the prior of `config` on the latent shards in `codes`, in the folder `run`, or continues there; best
    weights in `run/model`. draw: makes pictures of latents, for previews of samples; judge: figures of samples, for
    `train.evaluate_every`; notes: what a person should know of these.

    Raises UserError, before the first step, when the latents are not what `config` says.
    """
    check_stage(run, STAGE)
    training, validation = LatentDataset(codes, "train"), LatentDataset(codes, "validation")
    if not len(training):
        raise UserError(f"{codes} holds no latents of training images; encode the images that the VAE was trained on")
    config = config.resolved(training)
    torch.manual_seed(config.train.seed)
    prior = LATENT_PRIORS[config.model.kind](config.model, training.latent_spec, config.stage1_fingerprint or None)
    task = Stage2LatentTask(prior, training, validation, config.draws, draw)
    if config.start_from is not None and not has_begun(run):
        other = load_pretrained(config.start_from, {prior.kind: type(prior)})
        notes = (take_weights(prior, other).describe(config.start_from, other), *notes)
        task.started = True
    facts = RunFacts(
        stage=STAGE,
        samples="encoded images",
        defaults=defaults_of(config),
        data=lambda: fingerprints(training, validation),
        notes=notes,
    )
    evaluation = None if judge is None else task.evaluation(config.train.evaluate_images, judge)
    return fit(task, training, validation, config.train, run, asdict(config), facts, evaluation)


def fingerprints(training: LatentDataset, validation: LatentDataset) -> dict[str, str]:
    """Of what the config names by its path. Raises UserError for shards that are not what their index promises."""
    for latents in (training, validation):
        latents.verify()
    return {"codes": training.fingerprint()}
