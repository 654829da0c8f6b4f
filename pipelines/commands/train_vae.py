"""`zellige train-vae`: a likelihood VAE learns to turn images into continuous latents and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.errors import UserError
from common.processes import use_device
from pipelines.options import read_recipe, split_device
from stage1_vae.train import Stage1VAEConfig, train_vae


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-vae", Stage1VAEConfig, "vae", rest)
    if not config.data.path:
        raise UserError(
            "data.path is empty: expected a folder of images, an .npz file or a name such as mnist; give --data.path"
        )

    def train() -> str:
        use_device(device)
        return train_vae(config, run).summary(f"zellige generate --model {run} --num 64 --out IMAGES")

    return train
