"""`zellige train-stage2`: a prior learns which codes follow which, or where the latents of images lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.options import kind_of_model, read_recipe, split_device
from pipelines.trainings import shards_of, train_stage2
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.train import Stage2Config
from stage2_prior.train_latents import Stage2LatentConfig


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    of_latents = kind_of_model("train-stage2", "stage2", rest) in LATENT_PRIORS
    config_class: type[Stage2Config] | type[Stage2LatentConfig] = Stage2LatentConfig if of_latents else Stage2Config
    config, run = read_recipe("train-stage2", config_class, "stage2", rest)
    shards_of(config)

    def train() -> str:
        following = f"zellige assemble --stage1 {config.decoder or 'RUN'} --stage2 {run} --out MODEL"
        return train_stage2(config, run, device=device).summary(following)

    return train
