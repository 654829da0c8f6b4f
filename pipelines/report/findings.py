"""What a report is asked for, and what it finds of each subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from images.datasets import DataConfig
from pipelines.report.codebook import GridBook, GridPlaces, GridUse
from pipelines.report.collect import Subject
from pipelines.report.latents import Latents, VAESamples
from pipelines.report.memorisation import Memorisation
from pipelines.report.models import Models
from pipelines.report.reconstructions import Reconstructions
from pipelines.report.samples import Samples
from pipelines.report.settings import CommandLine


class Asked(NamedTuple):
    """What a report is asked for besides its subjects."""

    data: DataConfig | None  # test images, of any size
    codes: str | None  # code shards that a prior was trained on
    seed: int
    num: int  # test images that are measured
    samples: int  # that are drawn at each setting; 0: none
    batch_size: int
    device: torch.device


class Missing(NamedTuple):
    """In the place of what cannot be made."""

    why: str  # one line: what to give


NOTHING = Missing("")


class Positions(NamedTuple):
    grids: list[GridPlaces]
    said: str  # of which images the bits under the prior are, or why there are none


@dataclass
class Findings:
    """All that a page says of one subject, by section."""

    subject: Subject
    models: Models
    facts: list[tuple[str, str]] = field(default_factory=list)
    reconstructions: Reconstructions | Missing = NOTHING
    codebook: list[GridBook] | Missing = NOTHING
    usage: list[GridUse] | Missing = NOTHING
    codes_title: str = ""  # of the images whose codes are counted
    positions: Positions | Missing = NOTHING
    samples: Samples | VAESamples | Missing = NOTHING
    memorisation: Memorisation | Missing = NOTHING
    latents: Latents | Missing = NOTHING
    speeds: list[tuple[str, str]] = field(default_factory=list)
    commands: Sequence[CommandLine] = ()

    @property
    def is_vae(self) -> bool:
        return self.models.of_latents
