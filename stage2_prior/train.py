"""The stage-two task: a prior learns which codes follow which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage1_vq.codes import CodeDataset
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, Prior, PriorConfig
from training.errors import UserError
from training.loop import FitResult, TrainConfig, fit
from training.model_io import PretrainedModel
from training.task import Batch, Companion, Guard, StepOutput


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """One complete stage-two run: a prior, codes, and how to train."""

    model: PriorConfig
    train: TrainConfig
    codes: str | None = None  # folder of code shards that `zellige encode` wrote
    label_dropout: float = 0.1  # share of samples that train the null label, which guidance needs; 0 = no guidance
    # The rest comes from the code shards and is recorded in the run; a value given here must agree with them.
    grids: str | None = None  # of the codes, such as `8x8 codes of 512`
    num_classes: int | None = None  # of the images; 0 = train without classes although the images have some
    stage1_fingerprint: str | None = None  # of the autoencoder that made the codes

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"label_dropout={self.label_dropout}, expected a share from 0 to below 1; 0.1 is usual")

    def resolved(self, codes: CodeDataset) -> Stage2Config:
        """This config with the facts of the codes filled in. Raises UserError where it says otherwise."""
        found: dict[str, Any] = {
            "grids": codes.code_spec.describe(),
            "num_classes": codes.num_classes,
            "stage1_fingerprint": codes.stage1_fingerprint,
        }
        if self.num_classes == 0:
            found["num_classes"] = 0
        for name, value in found.items():
            expected = getattr(self, name)
            if expected is not None and expected != value:
                raise UserError(
                    f"{name} is {expected} in the config and {value} in the codes of {codes.folder}; leave {name} out "
                    "of the config, or name other codes"
                )
        return replace(self, codes=str(codes.folder), **found)


class Stage2Task:
    """training.task.Task of stage two. Batches are {"codes": tuple of int64 b h w, "labels": int64 b}, a label below 0
    for none.

    Metrics, of training steps and of validation on images that neither stage has trained on: `nll`, nats per code;
    `bits_per_code`; and `bits_per_dimension`, the bits of an image's codes over its H * W * c numbers.
    """

    best_metric = "bits_per_code"

    def __init__(self, model: Prior, label_dropout: float) -> None:
        self.model: PretrainedModel = model
        self.companions: dict[str, Companion] = {}
        self.guard: Guard | None = None
        self.prior = model
        self.label_dropout = label_dropout

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        pass

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        labels = self.known(batch["labels"])
        dropped = torch.rand(labels.shape, device=labels.device) < self.label_dropout
        condition = self.condition(labels.masked_fill(dropped, self.prior.num_classes))
        loss, nll = model(batch["codes"], condition)  # each b
        return StepOutput(loss.mean(), {} if nll is None else self.metrics(nll.mean()))

    def after_step(self) -> dict[str, Tensor]:
        return {}

    def discard_step(self) -> None:
        pass

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(model, Prior)
        return self.metrics(model.nll(batch["codes"], self.condition(self.known(batch["labels"]))).mean(dim=1))

    def preview(self, model: nn.Module) -> Tensor | None:
        return None  # codes are no picture without the decoder, which stage two does not know

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return []

    def known(self, labels: Tensor) -> Tensor:
        """Labels with the null label for images that have none."""
        return labels.masked_fill(labels < 0, self.prior.num_classes)

    def condition(self, labels: Tensor) -> Condition:
        return Condition(labels if self.prior.num_classes else None)

    def metrics(self, nll: Tensor) -> dict[str, Tensor]:
        spec = self.prior.code_spec
        bits = nll / math.log(2)
        bits_per_dimension = bits * (spec.codes_per_image / spec.image_dimensions)
        return {"nll": nll, "bits_per_code": bits, "bits_per_dimension": bits_per_dimension}


def train_stage2(config: Stage2Config, codes: Path, run: Path) -> FitResult:
    """Trains the prior of `config` on the code shards in `codes`, in the folder `run`, or continues there; best weights
    in `run/model`.

    Raises UserError, before the first step, when the codes are not what `config` says or not what its prior can model.
    """
    train_codes = CodeDataset(codes, "train")
    if not len(train_codes):
        raise UserError(f"{codes} holds no codes of training images; encode the images that stage one was trained on")
    config = config.resolved(train_codes)
    num_classes = config.num_classes or 0
    torch.manual_seed(config.train.seed)
    prior = PRIORS[config.model.kind](
        config.model,
        train_codes.code_spec,
        num_classes,
        class_names=train_codes.class_names if num_classes else None,
        stage1_fingerprint=config.stage1_fingerprint,
        knows_null_label=config.label_dropout > 0,
    )
    task = Stage2Task(prior, config.label_dropout)
    return fit(task, train_codes, CodeDataset(codes, "validation"), config.train, run, asdict(config))
