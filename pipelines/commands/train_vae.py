"""`zellige train-vae`: a likelihood VAE learns to turn images into continuous latents and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.options import read_recipe, split_device
from pipelines.trainings import check_images, train_vae
from stage1_vae.train import Stage1VAEConfig


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-vae", Stage1VAEConfig, "vae", rest)
    check_images(config.data.path)

    def train() -> str:
        return train_vae(config, run, device=device).summary(f"zellige generate --model {run} --num 64 --out IMAGES")

    return train
