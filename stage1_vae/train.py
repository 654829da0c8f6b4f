"""One complete run of a likelihood VAE."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from common.errors import UserError
from common.processes import process_state
from common.runs import VAE as STAGE
from common.short_repr import changes
from common.starting import freeze
from common.wording import either
from images.datasets import DataConfig, image_datasets
from images.files import BAD_FILES_NAME
from images.run_facts import check_apart, fingerprint_of
from metrics.in_training import OfReconstructions, network_of
from stage1_vae.binarise import Binarisation, Binarised, NumberedImages
from stage1_vae.hierarchies.base import HierarchicalVAE
from stage1_vae.holes import HolesConfig, seen_images
from stage1_vae.labels.base import LabelledVAE
from stage1_vae.labels.task import SemiSupervisedTask
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.modalities.multimodal import Multimodal, MultimodalConfig
from stage1_vae.modalities.task import MultimodalTask, check_symbols, symbols_of
from stage1_vae.models import LABELLED, MODELS, ModelConfig, build_model
from stage1_vae.objectives import (
    BalancedConfig,
    ELBOConfig,
    ImportanceConfig,
    MixtureBoundConfig,
    ObjectiveConfig,
    SemiSupervisedConfig,
    SubsampledConfig,
    build_objective,
)
from stage1_vae.objectives.base import TrainingFacts
from stage1_vae.start import begin_from
from stage1_vae.task import VAETask
from training.loop import FitResult, TrainConfig, fit
from training.run_folder import RunFacts, check_stage, defaults_of, has_begun


@dataclass(frozen=True, kw_only=True)
class Stage1VAEConfig:
    """One complete run of a likelihood VAE: a model, an objective, images, and how to train."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    objective: ObjectiveConfig = field(default_factory=ELBOConfig)
    binarised: Binarisation = "none"  # grey to black and white: white from half on, or drawn by chance once, or anew
    start_from: str | None = None  # run or model folder of a VAE whose weights this one begins with, as far as they fit
    frozen: tuple[str, ...] = ()  # parts of the model that do not learn, such as [encoder]
    binarised_seed: int = 0  # of that chance; apart from train.seed, so that runs see the same images
    holes: HolesConfig = field(default_factory=HolesConfig)  # missing pixels

    __repr__ = changes

    def __post_init__(self) -> None:
        if self.model.channels != self.data.channels:
            raise UserError(
                f"model.channels={self.model.channels} and data.channels={self.data.channels} differ: "
                "give both the number of channels that the images have"
            )
        if self.data.aspect_buckets:
            raise UserError(
                f"data.aspect_buckets={self.data.aspect_buckets}, expected 0: a VAE knows images of one size"
            )
        check_objective(self.model, self.objective)
        labelled = self.model.kind in LABELLED
        if labelled != isinstance(self.objective, SemiSupervisedConfig):
            raise UserError(
                f"model.kind={self.model.kind} with objective.kind={self.objective.kind}, expected either "
                f"{either(LABELLED)} with semi_supervised, or neither: both are of images of which some say their class"
            )
        pair = self.model.pair if isinstance(self.model, MultimodalConfig) else None
        if self.data.labels_per_class is not None and not labelled and pair not in ("image_label", "image_tokens"):
            known = f"model.kind={self.model.kind}" if pair is None else f"model.pair={pair}"
            raise UserError(
                f"data.labels_per_class={self.data.labels_per_class} with {known}, which looks at no labels; leave it "
                "out"
            )
        if self.holes.some and not getattr(self.model, "holes", False):
            raise UserError(
                f"images with holes for model.kind={self.model.kind}, which takes whole ones, expected a vae that "
                "knows missing pixels: give --model.kind vae --model.holes true"
            )
        if self.holes.some and self.train.evaluate_every:
            raise UserError(
                f"train.evaluate_every={self.train.evaluate_every}, expected 0: images with holes cannot be judged by "
                "features of whole ones"
            )
        if self.binarised_seed < 0:
            raise UserError(f"binarised_seed={self.binarised_seed}, expected 0 or more")

    @property
    def images_are_as_modelled(self) -> bool:
        """Whether a likelihood of binary images gets binary ones."""
        return self.binarised != "none" or not isinstance(self.model.likelihood, BernoulliConfig)


def check_objective(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """Raises UserError for an objective of another kind of model."""
    several = isinstance(objective, SubsampledConfig | MixtureBoundConfig)
    if several != isinstance(model, MultimodalConfig):
        raise UserError(
            f"model.kind={model.kind} with objective.kind={objective.kind}, expected either multimodal with subsampled "
            "or mixture_bound, or neither: both are of several modalities"
        )
    if isinstance(model, MultimodalConfig):
        fitting = "subsampled" if model.experts == "product" else "mixture_bound"
        if objective.kind != fitting:
            raise UserError(
                f"model.experts={model.experts} with objective.kind={objective.kind}, expected {fitting}: the other is "
                "of the other kind of posterior"
            )
    if not issubclass(MODELS[model.kind][0], HierarchicalVAE):
        return
    if not isinstance(objective, ELBOConfig | BalancedConfig | ImportanceConfig):
        raise UserError(
            f"objective.kind={objective.kind} with model.kind={model.kind}, expected elbo, balanced or importance: the "
            "others ask for one posterior of all latents, and a hierarchy has one for each group, given other groups"
        )
    if isinstance(objective, ImportanceConfig) and not objective.is_plain:
        raise UserError(
            f"objective.gradient={objective.gradient} and objective.generator_over_all={objective.generator_over_all} "
            f"with model.kind={model.kind}, expected reparameterised and false: the others part the gradient at the "
            "one posterior of all latents, and a hierarchy has one for each group"
        )


def train_vae(config: Stage1VAEConfig, run: Path) -> FitResult:
    """Trains a likelihood VAE in the folder `run`, or continues there; best weights in `run/model`. Raises UserError.

    Images that cannot be read are named in `run/bad_files.txt`.
    """
    check_stage(run, STAGE)
    check_apart(config.data, run)
    seed = config.train.seed
    train_images, held_out = image_datasets(config.data, seed, bad_files=run / BAD_FILES_NAME)
    train_data = NumberedImages(
        train_images, config.binarised, config.binarised_seed, training=True, holes=config.holes
    )
    validation_data = NumberedImages(
        held_out, config.binarised, config.binarised_seed, training=False, holes=config.holes
    )
    torch.manual_seed(seed)
    binarised = Binarised(config.binarised, config.binarised_seed)
    model = build_model(config.model, (config.data.height, config.data.width), binarised)
    notes: tuple[str, ...] = ()
    started = False
    if config.start_from is not None and not has_begun(run):
        notes, started = begin_from(model, config.start_from)
    freeze(model, config.frozen)
    task_class = VAETask
    if isinstance(model, LabelledVAE):
        model.name_classes(train_images.class_names)
        task_class = SemiSupervisedTask
    elif isinstance(model, Multimodal):
        model.class_names = train_images.class_names
        task_class = MultimodalTask
    if not started and (count := min(model.start_images, len(train_data))):
        chosen = [i * len(train_data) // count for i in range(count)]
        model.start(seen_images(train_data.fetch(chosen, chosen)))
    facts_of_training = TrainingFacts(
        images=len(train_data),
        steps=config.train.steps,
        latent_shape=model.shape,
        generator=tuple(model.generator_parameters()),
        labels=train_data.labels,
        batch_size=config.train.batch_size,
        regularised=model.regularised,
    )
    objective = build_objective(config.objective, facts_of_training)
    train_data.mixture = objective.mixture
    task = task_class(
        model,
        objective,
        validation_data,
        batch_size=config.train.batch_size,
        seed=seed,
        as_modelled=config.images_are_as_modelled,
    )
    if isinstance(model, Multimodal) and isinstance(task, MultimodalTask):
        task.symbols = symbols_of(model.config, train_images)
        check_symbols(model.config, task.symbols, train_images)
        task.held_out_symbols = symbols_of(model.config, held_out)
    bad_images = train_images.bad_images

    def known_bad_images() -> str:
        """Of an earlier start."""
        bad_images.keep_only([train_images.source.title, held_out.source.title])
        return bad_images.summary()

    def fingerprints() -> dict[str, str]:
        found = {"data.path": fingerprint_of(train_images)}
        if config.data.validation_path is not None:
            found["data.validation_path"] = fingerprint_of(held_out)
        return found

    network = network_of(config.train)
    judged = None
    if network is not None:
        if model.mean_is_drawn:
            raise UserError(
                f"train.evaluate_every={config.train.evaluate_every}, expected 0: this decoder draws an image pixel "
                "after pixel, which takes too long in a training; evaluate the finished model"
            )
        judged = OfReconstructions(network, validation_data, config.train.evaluate_images)
    notes += () if config.images_are_as_modelled else (GREY,)
    notes += () if judged is None else (judged.note,)
    facts = RunFacts(stage=STAGE, defaults=defaults_of(config), data=fingerprints, opened=known_bad_images, notes=notes)
    result = fit(task, train_data, validation_data, config.train, run, asdict(config), facts, judged)
    if process_state().is_main_process and (line := bad_images.summary()):
        print(line, flush=True)
    return result


GREY = (
    "a likelihood of black and white is trained on grey images: its figures are no likelihoods of anything; give "
    "--binarised once, or another --model.likelihood.kind"
)
