"""`zellige write`: new sequences of a VAE of texts or drawings, at several temperatures, or between two of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_text
from common.model_io import load_pretrained, model_folder
from common.owned_folder import SHEET_NAME
from common.processes import process_state
from common.runs import config_of_run
from common.wording import counted
from pipelines.devices import open_device
from pipelines.latents.pipeline import on_the_way
from pipelines.pictures import contact_sheet, in_columns, save_png
from pipelines.settings import results_folder
from stage1_vae.evaluation import mixed
from stage1_vae.sequences.data import SequenceDataConfig, open_sequences
from stage1_vae.sequences.pictures import picture, svg
from stage1_vae.sequences.sequence_vae import SequenceVAE

COLUMNS = 10
TEXT_NAME = "lines.txt"


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Writes what a model of sequences draws from its prior, or what lies between two sequences."""

    model: str  # run or model folder of a VAE of sequences, or a hub id
    out: str  # folder: lines.txt of a model of texts; 000000.svg ... and sheet.png of one of drawings
    num: int = 20  # sequences; between two: steps of the way, both included
    temperatures: tuple[float, ...] = (1.0,)  # of each step's choice, each for all sequences: 0 is the most probable
    seed: int = 0  # of the draws: sequence i of a seed is always the same
    between: str | None = None  # file that the run was trained on, or hershey: of which two sequences are taken
    first: int = 0  # number of the one that the way leads from, among those held out
    second: int = 1  # number of the other
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if self.num < (1 if self.between is None else 2):
            raise UserError(f"num={self.num}, expected at least {1 if self.between is None else 2}")
        if self.between is None and (self.first, self.second) != (0, 1):
            raise UserError(
                f"first={self.first} and second={self.second} are the ends of a way, got none; name the file of its "
                "sequences by between, or leave them out"
            )
        if not self.temperatures or any(one < 0 for one in self.temperatures):
            raise UserError(f"temperatures={self.temperatures}, expected one or more, each 0 or above")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed}, expected 0 to {2**64 - 1}")


def write_sequences(config: WriteConfig) -> str:
    """Writes `config.out`; returns one line. Sequence i has the same latents whatever the number. Raises UserError."""
    _, device = open_device(config.device)
    folder = model_folder(config.model, advice="name the run or model folder that `zellige train-sequence` wrote")
    model = load_pretrained(folder, {SequenceVAE.kind: SequenceVAE}).to(device).eval()
    latents = latents_of(model, config, device)
    settings = {
        "model": model.fingerprint(),
        "seed": config.seed,
        "temperatures": list(config.temperatures),
        "between": None if config.between is None else [config.between, config.first, config.second],
        "num": config.num,  # goes with the temperatures into the number of a file, and into every step of a way
    }
    out = Path(config.out)
    pattern = "*.svg" if model.vocabulary is None else TEXT_NAME
    with results_folder(out, "write", settings, process_state(), results=pattern):
        drawn = [
            [drawn_alone(model, latents[i : i + 1], temperature, config.seed, i) for i in range(config.num)]
            for temperature in config.temperatures
        ]
        if model.vocabulary is not None:
            lines = [
                f"{'' if len(drawn) == 1 else f'{temperature:g}: '}{model.text(tokens)}"
                for temperature, row in zip(config.temperatures, drawn, strict=True)
                for tokens in row
            ]
            write_text(out / TEXT_NAME, "\n".join(lines) + "\n")
            return f"{counted(len(lines), 'line')} in {out / TEXT_NAME}"
        for number, strokes in enumerate(one for row in drawn for one in row):
            write_text(out / f"{number:06d}.svg", svg(strokes))
        rows = [[picture(strokes) for strokes in row] for row in drawn]
        if len(rows) == 1:
            save_png(contact_sheet(in_columns(rows[0], COLUMNS)), out / SHEET_NAME)
        else:
            save_png(contact_sheet(rows, [f"{one:g}" for one in config.temperatures]), out / SHEET_NAME)
    return f"{counted(len(drawn) * config.num, 'drawing')} in {out}, all of them on {out / SHEET_NAME}"


@torch.no_grad()
def latents_of(model: SequenceVAE, config: WriteConfig, device: torch.device) -> Tensor:
    """num d: draws of the prior, or a way from one sequence's posterior mean to another's."""
    if config.between is None:
        seeds = [mixed(config.seed, i, 0) for i in range(config.num)]
        return torch.cat([model.prior.sample(1, torch.Generator(device).manual_seed(seed)) for seed in seeds])
    unit: Literal["word", "character"] = "word" if model.joint else "character"
    trained = config_of_run(Path(config.model)).get("sequences", {"unit": unit, "longest": model.longest})
    asked = SequenceDataConfig(**{**trained, "path": config.between})
    _, held_out, vocabulary = open_sequences(asked, 0)
    if (vocabulary is None) != (model.vocabulary is None) or (vocabulary or []) != (model.vocabulary or []):
        raise UserError(
            f"between={config.between} holds other sequences than the model was trained on, or it held out as many as "
            "only its run tells: name those, and the run folder as model"
        )
    for name in ("first", "second"):
        if not 0 <= getattr(config, name) < len(held_out):
            raise UserError(f"{name}={getattr(config, name)}, expected 0 to {len(held_out) - 1}")
    means = [model.encode(held_out.fetch([i], [i])["sequences"].to(device))[0] for i in (config.first, config.second)]
    shares = torch.linspace(0, 1, config.num).tolist()
    return torch.stack([on_the_way(means[0], means[1], share) for share in shares])


def drawn_alone(model: SequenceVAE, latents: Tensor, temperature: float, seed: int, number: int) -> np.ndarray:
    generator = torch.Generator(latents.device).manual_seed(mixed(seed, number, 1))
    return model.draw(latents, temperature, generator)[0]
