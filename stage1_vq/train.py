"""The stage-one task: one step, one validation, one preview."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from common.files import read_json, sha256_of_file
from common.model_io import PretrainedModel, load_pretrained
from common.processes import process_state
from common.runs import FACTS_NAME
from common.short_repr import changes
from common.starting import freeze, stands_still, take_weights
from common.wording import an
from images.datasets import DataConfig, ImageDataset, image_datasets, to_float
from images.files import BAD_FILES_NAME
from images.run_facts import check_apart, fingerprint_of
from images.sheets import contact_sheet, to_pil, to_tensor
from metrics.in_training import OfReconstructions, network_of
from metrics.similarity import psnr
from stage1_vq.autoencoders import AUTOENCODERS, AutoencoderConfig
from stage1_vq.autoencoders.base import Autoencoder, Stage1Output
from stage1_vq.autoencoders.flow_decoder import FlowDecoder, FlowDecoderConfig
from stage1_vq.losses.adversarial import COMPANION, AdversarialConfig, Adversary, passed_to
from stage1_vq.losses.alignment import COMPANION as ALIGNMENT
from stage1_vq.losses.alignment import Alignment, AlignmentConfig
from stage1_vq.losses.distillation import COMPANION as TEACHER
from stage1_vq.losses.distillation import DistillationConfig, Lesson, Teacher
from stage1_vq.losses.perceptual import LPIPSConfig, PerceptualConfig, PerceptualLoss
from stage1_vq.quantizers import Quantizer
from training.data import batches_of
from training.loop import FitResult, TrainConfig, fit
from training.previews import preview_rows
from training.run_folder import RunFacts, check_stage, defaults_of, has_begun
from training.task import Batch, Companion, Dataset, Guard, StepOutput

STAGE = "stage one"
TOKENIZER = "tokenizer"  # of a flow decoder: the part that makes its codes
DECODER = "decoder"  # of each autoencoder: the part that makes no codes
PREVIEW_SIDE = 112  # pixels: smaller images are magnified in previews


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """One complete stage-one run: an autoencoder, images, and how to train."""

    model: AutoencoderConfig
    data: DataConfig
    train: TrainConfig
    perceptual: PerceptualConfig = field(default_factory=LPIPSConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    start_from: str | None = None  # run or model folder of such an autoencoder, whose weights this one begins with
    frozen: tuple[str, ...] = ()  # parts of the model that do not learn, such as [encoder, quantizer]

    __repr__ = changes

    def __post_init__(self) -> None:
        H, W = self.data.height, self.data.width
        if self.model.channels != self.data.channels:
            raise UserError(
                f"model.channels={self.model.channels} and data.channels={self.data.channels} differ: "
                "give both the number of channels that the images have"
            )
        if self.data.labels_per_class is not None:
            raise UserError(
                f"data.labels_per_class={self.data.labels_per_class}, expected none: autoencoders look at no labels; "
                "leave it out"
            )
        if H % self.model.stride or W % self.model.stride:
            raise UserError(
                f"data.image_size={H}x{W} does not fit a model whose codes stand for {self.model.stride}x"
                f"{self.model.stride} pixels: give multiples of {self.model.stride}"
            )
        if self.data.aspect_buckets and not AUTOENCODERS[self.model.kind].codes_have_places:
            raise UserError(
                f"data.aspect_buckets={self.data.aspect_buckets}, expected 0: {an(self.model.kind)} model knows images "
                "of one size"
            )
        if self.adversarial.weight and self.adversarial.rollback and not self.train.validate_every:
            raise UserError(
                "adversarial.rollback=true with train.validate_every=0: only validations tell when to roll back; "
                "give train.validate_every=500 or so, or adversarial.rollback=false"
            )

        if self.distillation.teacher_steps:
            self.check_distillation(self.distillation.teacher_steps)

    def check_distillation(self, teacher_steps: int) -> None:
        """Raises UserError."""
        asked = f"distillation.teacher_steps={teacher_steps}"
        if not isinstance(self.model, FlowDecoderConfig):
            raise UserError(
                f"{asked} with model.kind={self.model.kind}, expected flow_decoder: no other kind learns it"
            )
        if self.model.steps != 1:
            raise UserError(
                f"{asked} with model.steps={self.model.steps}, expected 1: one step is what is learned; give "
                "--model.steps 1"
            )
        if TOKENIZER not in self.frozen:
            raise UserError(
                f"{asked} with frozen={list(self.frozen)}, expected {TOKENIZER} among them: teacher and student have "
                "the same codes; give --frozen '[tokenizer]'"
            )

    def resolved(self) -> dict[str, Any]:
        """What decides a run, as plain values: losses and buckets that are off are left out with their settings."""
        values = asdict(self)
        if not self.data.aspect_buckets:
            del values["data"]["aspect_buckets"], values["data"]["aspect_limit"]
        for name in ("perceptual", "adversarial", "alignment"):
            if not values[name]["weight"]:
                del values[name]
        if not self.distillation.teacher_steps:
            del values["distillation"]
        for name in ("start_from", "frozen"):
            if not values[name]:
                del values[name]
        return values


class Stage1Task:
    """training.task.Task of stage one. Batches are {"images": uint8 b c H W, ...}.

    The loss is the sum of the autoencoder's own losses and, where they are on, a perceptual one, an adversarial one and
    one of alignment. With a teacher the first two judge by its images.

    Validation, on images that are never trained on: `mse`, the mean squared error of pixels in [-1, 1] of the clamped
    reconstruction, `psnr` in dB, and `perceptual`, the perceptual distance where there is one, each averaged over
    images. The weights kept are those of the lowest mse; with an adversary those that it does not object to
    (stage1_vq/losses/adversarial.py), for the lowest mse would be that from before the adversarial phase.
    """

    best_metric = "mse"

    def __init__(
        self,
        model: Autoencoder,
        validation_data: Dataset,
        steps_per_epoch: int,
        perceptual: PerceptualLoss | None = None,
        adversary: Adversary | None = None,
        alignment: Alignment | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """steps_per_epoch: the span over which the use of codes is reported."""
        self.model: PretrainedModel = model
        self.autoencoder = model
        self.validation_data = validation_data
        self.steps_per_epoch = steps_per_epoch
        self.perceptual, self.adversary, self.alignment, self.teacher = perceptual, adversary, alignment, teacher
        self.guard: Guard | None = adversary
        self.companions: dict[str, Companion] = {}
        if perceptual is not None:
            self.companions["perceptual"] = Companion(perceptual, compiled=True)
        if adversary is not None:
            self.companions[COMPANION] = Companion(adversary, adversary.optimizer, adversary.learning_rate)
        if alignment is not None:
            self.companions[ALIGNMENT] = Companion(alignment, alignment.optimizer, alignment.learning_rate)
        if teacher is not None:
            self.companions[TEACHER] = Companion(teacher)

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.autoencoder.initialise([to_float(batch["images"]) for batch in batches])

    def step(self, model: nn.Module, batch: Batch, step: int) -> StepOutput:
        self.autoencoder.begin_step(step)
        images = to_float(batch["images"])
        lesson: Lesson | None = None if self.teacher is None else self.teacher(images)
        output: Stage1Output = model(images) if lesson is None else model(images, *lesson)
        wanted = images if lesson is None else lesson.target
        losses, figures = dict(output.losses), dict(output.statistics)
        companion_losses: dict[str, Tensor] = {}
        if self.perceptual is not None:
            distance = self.perceptual(output.reconstruction, wanted)
            losses["perceptual_loss"] = passed_to(output.reconstruction, self.perceptual.weight * distance.mean())
        if self.adversary is not None:
            others, last_layer = total(losses), self.autoencoder.last_layer()
            gained, adversarial_figures = self.adversary.losses(output.reconstruction, others, last_layer, step)
            losses |= gained
            learned, discriminator_figures = self.adversary.observe(output.reconstruction, wanted, step)
            companion_losses |= learned
            figures |= adversarial_figures | discriminator_figures
        if self.alignment is not None:
            assert output.aligned is not None  # every autoencoder gives them in training
            losses["alignment_loss"], own = self.alignment.losses(output.aligned, images)
            companion_losses |= own
        metrics = {name: value.detach() for name, value in losses.items()}
        return StepOutput(total(losses), {**metrics, **figures}, companion_losses)

    def after_step(self, step: int) -> None:
        if self.adversary is not None:
            self.adversary.update()
        self.autoencoder.update()

    def health(self) -> dict[str, Tensor]:
        return self.autoencoder.health(self.steps_per_epoch)

    def discard_step(self) -> None:
        self.autoencoder.discard()
        if self.adversary is not None:
            self.adversary.discard()

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images = to_float(batch["images"])
        output: Stage1Output = model(images)
        reconstruction = output.reconstruction.float().clamp(-1, 1)
        mse = reduce(F.mse_loss(reconstruction, images, reduction="none"), "b c h w -> b", "mean")
        metrics = {"mse": mse, "psnr": psnr(mse)}
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, images)
        return metrics

    def preview(self, model: nn.Module) -> Tensor | None:
        """Held-out images, always the same, of all classes and from all over the set, each row above what is decoded of
        it: a sheet with names, 3 H W."""
        if not len(self.validation_data):
            return None
        data = self.validation_data
        labels, names = np.full(len(data), -1), None
        if isinstance(data, ImageDataset):
            labels, names = data.labels, data.class_names
        rows = preview_rows(labels)
        real: dict[int, Image.Image] = {}
        decoded: dict[int, Image.Image] = {}
        chosen = [i for row in rows for i in row]
        for batch in batches_of(data, chosen, len(chosen)):
            images = to_float(data.fetch(batch, batch)["images"])
            output: Stage1Output = model(images.to(next(model.parameters()).device))
            real |= zip(batch, map(to_pil, images), strict=True)
            decoded |= zip(batch, map(to_pil, output.reconstruction.float().clamp(-1, 1)), strict=True)
        titled = [[names[labels[i]] for i in row] if names else [] for row in rows]
        sheet = contact_sheet(
            [[pictures[i] for i in row] for row in rows for pictures in (real, decoded)],
            ["real", "decoded"] * len(rows),
            [title for row in titled for title in (row, [])],
            legible=PREVIEW_SIDE,
        )
        return to_tensor(sheet)

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return self.autoencoder.warnings(metrics, self.steps_per_epoch)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def train_stage1(config: Stage1Config, run: Path) -> FitResult:
    """Trains an autoencoder in the folder `run`, or continues there; best weights in `run/model`. Raises UserError.

    Images that cannot be read are named in `run/bad_files.txt`.
    """
    check_stage(run, STAGE)
    check_apart(config.data, run)
    train_data, validation_data = image_datasets(
        config.data,
        config.train.seed,
        bad_files=run / BAD_FILES_NAME,
        stride=config.model.stride,
        batch_size=config.train.batch_size,
    )
    if train_data.buckets is not None and process_state().is_main_process:
        print(f"training images by shape: {train_data.buckets.describe(train_data.indices)}", flush=True)
    teacher = teacher_of(config)
    torch.manual_seed(config.train.seed)
    model = AUTOENCODERS[config.model.kind](config.model, (config.data.height, config.data.width))
    notes = begun_from(config.start_from, model, run, config.frozen)
    steps_per_epoch = math.ceil(len(train_data) / config.train.batch_size)
    shapes = train_data.buckets.shapes if train_data.buckets is not None else ((config.data.height, config.data.width),)
    smallest = (min(height for height, _ in shapes), min(width for _, width in shapes))
    further = (*companions(config, smallest), alignment_of(config, model), teacher)
    task = Stage1Task(model, validation_data, steps_per_epoch, *further)
    bad_images = train_data.bad_images

    def known_bad_images() -> str:
        """Of an earlier start."""
        bad_images.keep_only([train_data.source.title, validation_data.source.title])
        return bad_images.summary()

    network = network_of(config.train)
    judged = None if network is None else OfReconstructions(network, validation_data, config.train.evaluate_images)
    facts = RunFacts(
        stage=STAGE,
        defaults=defaults_of(config),
        data=lambda: {**fingerprints(config, train_data, validation_data), **codes_made_by(model), **taught_by(task)},
        opened=known_bad_images,
        notes=(*notes, *(() if judged is None else (judged.note,))),
    )
    result = fit(task, train_data, validation_data, config.train, run, config.resolved(), facts, judged)
    if process_state().is_main_process and (line := bad_images.summary()):
        print(line, flush=True)
    return result


def begun_from(folder: str | None, model: Autoencoder, run: Path, frozen: Sequence[str]) -> tuple[str, ...]:
    """Gives the model of a new run the weights of the one in `folder`, and stills its `frozen` parts; lines that tell
    what it took. One whose decoder alone learns goes on with the codes of that model. Raises UserError."""
    notes: tuple[str, ...] = ()
    source, taken = None, None
    if folder is None and isinstance(model, FlowDecoder) and TOKENIZER in frozen:
        raise UserError(
            f"frozen={TOKENIZER} of fresh weights, whose codes tell next to nothing: name the model whose codes are to "
            "be decoded, --from MODEL; or leave frozen out, and both learn"
        )
    if folder is not None and not has_begun(run):
        source = load_pretrained(folder, model.sources())
        taken = take_weights(model, source)
        model.started = not any("quantizer" in name for name in taken.new)
        model.encoder_started = not any(name.startswith("encoder.") for name in taken.new)
        notes = (taken.describe(folder, source),)
    freeze_parts(model, frozen)
    others = [part for name, part in model.named_children() if name != DECODER]
    if folder is None or not all(map(stands_still, others)):
        return notes
    if source is None:
        model.codes_maker = read_json(run / FACTS_NAME)["data"].get("start_from")
    elif taken is not None and all(name.startswith(f"{DECODER}.") for name in (*taken.new, *taken.resized)):
        model.codes_maker = source.codes_fingerprint()
    return notes


def codes_made_by(model: Autoencoder) -> dict[str, str]:
    """For run.json: whose codes a run goes on with that began with another model."""
    return {} if model.codes_maker is None else {"start_from": model.codes_maker}


def freeze_parts(model: Autoencoder, parts: Sequence[str]) -> None:
    """Raises UserError for parts that cannot stand still alone."""
    freeze(model, parts)
    for name, module in model.named_modules():
        inside = [part for part in parts if part.startswith(f"{name}.")]
        if isinstance(module, Quantizer) and inside and not stands_still(module):
            raise UserError(f"frozen={inside[0]} is a part of a quantizer, which stands still as a whole; give {name}")


def fingerprints(config: Stage1Config, train: ImageDataset, validation: ImageDataset) -> dict[str, str]:
    """Of what the config names by its path, by the path of the field."""
    found = {"data.path": fingerprint_of(train)}
    if config.data.validation_path is not None:
        found["data.validation_path"] = fingerprint_of(validation)
    perceptual, adversarial, alignment = config.perceptual, config.adversarial, config.alignment
    for path, part, weight in (
        ("perceptual.weights", perceptual, perceptual.weight),
        ("perceptual.linear_weights", perceptual, perceptual.weight),
        ("adversarial.discriminator.weights", adversarial.discriminator, adversarial.weight),
        ("alignment.weights", alignment, alignment.weight),
    ):
        file = getattr(part, path.rpartition(".")[2], None)
        if weight and file is not None:
            found[path] = sha256_of_file(Path(file).expanduser())
    return found


def companions(config: Stage1Config, smallest: tuple[int, int]) -> tuple[PerceptualLoss | None, Adversary | None]:
    """The losses with networks of their own; None for those that are off. smallest: H and W that no training image
    falls short of. Raises UserError."""
    channels = config.data.channels
    perceptual = PerceptualLoss(config.perceptual, channels, smallest) if config.perceptual.weight else None
    if not config.adversarial.weight:
        return perceptual, None
    return perceptual, Adversary(config.adversarial, channels, smallest, config.train.steps)


def alignment_of(config: Stage1Config, model: Autoencoder) -> Alignment | None:
    """Of what the model gives to be aligned; None where it is off. Raises UserError."""
    if not config.alignment.weight:
        return None
    width = model.aligned_width()
    return Alignment(config.alignment, config.data.channels, width, places=model.aligned_has_places)


def teacher_of(config: Stage1Config) -> Teacher | None:
    """None without distillation. Raises UserError."""
    teacher_steps = config.distillation.teacher_steps
    if not teacher_steps:
        return None
    if config.start_from is None:
        raise UserError(
            f"distillation.teacher_steps={teacher_steps} without a teacher: name the trained flow decoder that "
            "teaches, --from MODEL"
        )
    return Teacher(config.distillation, config.start_from)


def taught_by(task: Stage1Task) -> dict[str, str]:
    """For run.json: a run goes on with the teacher that it began with."""
    return {} if task.teacher is None else {"distillation.teacher": task.teacher.model.fingerprint()}
