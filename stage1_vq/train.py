"""The stage-one task: one step, one validation, one preview."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from stage1_vq.autoencoders import AUTOENCODERS, AutoencoderConfig
from stage1_vq.autoencoders.base import Autoencoder, Stage1Output
from stage1_vq.images import DataConfig, image_datasets, to_float
from training.errors import UserError
from training.loop import FitResult, TrainConfig, fit
from training.model_io import PretrainedModel
from training.task import Batch, Dataset, StepOutput

BAD_FILES_NAME = "bad_files.txt"
PREVIEW_IMAGES, PREVIEW_COLUMNS = 16, 8


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """One complete stage-one run: an autoencoder, images, and how to train."""

    model: AutoencoderConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        H, W = self.data.height, self.data.width
        if self.model.channels != self.data.channels:
            raise UserError(
                f"model.channels={self.model.channels} and data.channels={self.data.channels} differ: "
                "give both the number of channels that the images have"
            )
        if H % self.model.stride or W % self.model.stride:
            raise UserError(
                f"data.image_size={H}x{W} does not fit a model whose codes stand for {self.model.stride}x"
                f"{self.model.stride} pixels: give multiples of {self.model.stride}"
            )


class Stage1Task:
    """training.task.Task of stage one. Batches are {"images": uint8 b c H W, ...}.

    Validation, on images that are never trained on: `mse`, the mean squared error of pixels in [-1, 1] of the clamped
    reconstruction, and `psnr` in dB, each averaged over images.
    """

    best_metric = "mse"

    def __init__(self, model: Autoencoder, validation_data: Dataset, steps_per_epoch: int) -> None:
        """steps_per_epoch: the span over which the use of codes is reported."""
        self.model: PretrainedModel = model
        self.autoencoder = model
        self.validation_data = validation_data
        self.steps_per_epoch = steps_per_epoch

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.autoencoder.initialise([to_float(batch["images"]) for batch in batches])

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        output: Stage1Output = model(to_float(batch["images"]))
        loss = torch.stack(list(output.losses.values())).sum()
        metrics = {name: value.detach() for name, value in output.losses.items()}
        return StepOutput(loss, {**metrics, **output.statistics})

    def after_step(self) -> dict[str, Tensor]:
        return self.autoencoder.update(self.steps_per_epoch)

    def discard_step(self) -> None:
        self.autoencoder.discard()

    def validate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images = to_float(batch["images"])
        output: Stage1Output = model(images)
        error = F.mse_loss(output.reconstruction.float().clamp(-1, 1), images, reduction="none")
        mse = reduce(error, "b c h w -> b", "mean")
        return {"mse": mse, "psnr": psnr(mse)}

    def preview(self, model: nn.Module) -> Tensor | None:
        """Held-out images, always the same and from all over the set, each row above that of their reconstructions."""
        held_out = len(self.validation_data)
        columns = min(PREVIEW_COLUMNS, held_out)
        if not held_out:
            return None
        count = min(PREVIEW_IMAGES, held_out) // columns * columns
        indices = [i * held_out // count for i in range(count)]
        images = to_float(self.validation_data.fetch(indices, indices)["images"])
        images = images.to(next(model.parameters()).device)
        output: Stage1Output = model(images)
        pairs = torch.stack([images, output.reconstruction.float().clamp(-1, 1)])
        return rearrange(pairs, "pair (rows columns) c h w -> c (rows pair h) (columns w)", columns=columns)

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        return self.autoencoder.warnings(metrics, self.steps_per_epoch)


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], peak to peak 2; at most 100."""
    return 10 * torch.log10(4 / mse.clamp(min=4e-10))


def train_stage1(config: Stage1Config, run: Path) -> FitResult:
    """Trains an autoencoder in the folder `run`, or continues there; best weights in `run/model`. Raises UserError.

    Images that cannot be read are named in `run/bad_files.txt`.
    """
    train_data, validation_data = image_datasets(config.data, config.train.seed, bad_files=run / BAD_FILES_NAME)
    torch.manual_seed(config.train.seed)
    model = AUTOENCODERS[config.model.kind](config.model, (config.data.height, config.data.width))
    steps_per_epoch = math.ceil(len(train_data) / config.train.batch_size)
    task = Stage1Task(model, validation_data, steps_per_epoch)
    return fit(task, train_data, validation_data, config.train, run, asdict(config))
