"""`zellige assemble`: an autoencoder and its prior become one model folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from pipelines.two_stage import TwoStagePipeline, stage_folder
from stage1_vq.autoencoders import AUTOENCODERS
from stage2_prior.priors import PRIORS
from stage2_prior.sampling import SamplingConfig
from training.model_io import load_pretrained


@dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """One model folder from two runs, with the sampling settings that it will use by default."""

    stage1: str  # run or model folder of the autoencoder, a model that was assembled with it, or a hub id
    stage2: str  # run or model folder of the prior, a model that was assembled with it, or a hub id
    out: str  # the model folder to write
    temperature: float = 1.0  # divides the logits
    top_k: int | None = None  # draw from the k most probable codes; left out: from all
    top_p: float = 1.0  # draw from the fewest codes that hold this share of the probability; 1: from all
    min_p: float = 0.0  # draw only from codes at least this share as probable as the most probable one; 0: from all
    guidance: float = 1.0  # weight of the class against no class; 1: none
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"  # how it rises over an image's steps
    guidance_start: float = 0.0  # share of an image's steps before which there is none
    guidance_end: float = 1.0  # share of an image's steps after which there is none
    steps: int | None = None  # of a maskgit or diffusion prior for an image; left out: 12 of maskgit, 64 of diffusion
    choice_temperature: float | None = None  # of maskgit: chance in which codes it keeps; left out: 4.5, 0: none

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(**{field.name: getattr(self, field.name) for field in fields(SamplingConfig)})


def assemble(config: AssembleConfig) -> str:
    """Writes the pipeline folder `config.out`; returns one line. Raises UserError if the two do not fit."""
    autoencoder = load_pretrained(stage_folder(config.stage1, "stage1"), AUTOENCODERS)
    prior = load_pretrained(stage_folder(config.stage2, "stage2"), PRIORS)
    pipeline = TwoStagePipeline(autoencoder, prior, config.sampling)
    folder = pipeline.save_pretrained(config.out)
    return f"the model is in {folder}; next: zellige generate --model {folder} --num 64 --out DIR"
