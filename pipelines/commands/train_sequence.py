"""`zellige train-sequence`: a likelihood VAE learns lines of a text, or drawings of a pen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.options import read_recipe, split_device
from pipelines.trainings import train_sequence
from stage1_vae.sequences.train import Stage1SequenceConfig


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-sequence", Stage1SequenceConfig, "sequences", rest)

    def train() -> str:
        following = f"zellige write --model {run} --num 20 --out WRITTEN"
        return train_sequence(config, run, device=device).summary(following)

    return train
