"""What `zellige evaluate` can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from common.errors import UserError
from pipelines.evaluation.images import EvaluateDataConfig
from pipelines.sampling_options import SamplingOptions
from stage1_vae.binarise import Binarisation


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingOptions):
    """Figures of a model on test images, and of samples against a reference, with the protocol they are part of."""

    model: str | None = None  # assembled model, stage one alone, a VAE, or a hub id; left out: --made alone is judged
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    against: str | None = None  # evaluation.json of an earlier run: its protocol is repeated, its figures are compared
    codes: str | None = None  # code shards that the prior was trained on: what their frequencies alone would need
    given: str | None = None  # of a model of given codes: code shards of the test images' other pictures
    given_split: Literal["train", "validation"] = "validation"  # which images of that folder
    num: int | None = None  # so many of the test images, evenly spread; left out: all
    batch_size: int = 64  # images at a time
    out: str | None = None  # JSON file for figures and protocol; left out: they are only printed
    draws: int | None = None  # of a VAE: of the latents of each image, for its log p; left out: 100
    seed: int = 0  # of samples, and of a VAE's draws
    binarised: Binarisation | None = None  # of a VAE: how images are made black and white; left out: as in its training
    pictures: str | None = None  # of a VAE: folder for samples, reconstructions, latent walks; left out: none are made
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        for name in ("num", "batch_size", "draws"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}, expected at least 1")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed}, expected 0 to {2**64 - 1}")

    def check_not_asked(self, names: Sequence[str], what: str) -> None:
        """Raises UserError for options that a model of this kind does not know."""
        for known in fields(self):
            value = getattr(self, known.name)
            if known.name in names and value != known.default:
                raise UserError(f"{known.name}={value}, expected it left out for {self.model}, {what}")
