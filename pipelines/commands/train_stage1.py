"""`zellige train-stage1`: an autoencoder learns to turn images into codes and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.folder_kinds import after_stage_one
from pipelines.options import read_recipe, split_device
from pipelines.trainings import check_images, train_stage1
from stage1_vq.train import Stage1Config


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-stage1", Stage1Config, "stage1", rest)
    check_images(config.data.path)

    def train() -> str:
        result = train_stage1(config, run, device=device)
        return result.summary(after_stage_one(Path(run)))

    return train
