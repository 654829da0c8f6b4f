"""`zellige train-stage1`: an autoencoder learns to turn images into codes and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.errors import UserError
from common.processes import use_device
from pipelines.options import read_recipe, split_device
from stage1_vq.train import Stage1Config, train_stage1


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-stage1", Stage1Config, "stage1", rest)
    if not config.data.path:
        raise UserError(
            "data.path is empty: expected a folder of images, an .npz file or a name such as cifar10; give --data.path"
        )

    def train() -> str:
        use_device(device)
        return train_stage1(config, run).summary(f"zellige encode --model {run} --out CODES")

    return train
