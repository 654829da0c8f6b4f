"""Trainings as functions of a config and a run folder, and configs from recipes: what commands and scripts call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

import stage1_vae.sequences.train
import stage1_vae.tables.train
import stage1_vae.train
import stage1_vq.train
import stage2_prior.train
import stage2_prior.train_latents
from codes.latents import LatentDataset
from codes.shards import CodeDataset
from codes.spec import Codes
from common.errors import UserError
from common.processes import use_device
from common.wording import an
from images.sheets import contact_sheet, to_pil, to_tensor
from pipelines.evaluation.in_training import judge_of_samples
from pipelines.folder_kinds import LATENT_SHARDS, SHARDS, check_kind
from pipelines.latents.models import check_latents_of, load_vae
from pipelines.options import read_recipe
from pipelines.stages import check_made_by, load_autoencoder
from stage1_vae.model import LikelihoodVAE
from stage1_vae.sequences.train import Stage1SequenceConfig
from stage1_vae.tables.train import Stage1TableConfig
from stage1_vae.train import Stage1VAEConfig
from stage1_vq.autoencoders import Autoencoder
from stage1_vq.train import Stage1Config
from stage2_prior.train import DrawCodes, Stage2Config
from stage2_prior.train_latents import DrawLatents, Stage2LatentConfig
from training.loop import FitResult

PREVIEW_SIDE = 112  # pixels: smaller images are magnified in previews

Config = TypeVar(
    "Config", Stage1Config, Stage1VAEConfig, Stage1TableConfig, Stage1SequenceConfig, Stage2Config, Stage2LatentConfig
)
RECIPES: dict[type, tuple[str, str]] = {  # the command that takes such a config, and the folder of its recipes
    Stage1Config: ("train-stage1", "stage1"),
    Stage1VAEConfig: ("train-vae", "vae"),
    Stage1TableConfig: ("train-table", "tables"),
    Stage1SequenceConfig: ("train-sequence", "sequences"),
    Stage2Config: ("train-stage2", "stage2"),
    Stage2LatentConfig: ("train-stage2", "stage2"),
}


def read_config(config_class: type[Config], recipe: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The config of a recipe, a YAML file or the name of a packaged one, with other values for some of its fields.

    >>> config = read_config(Stage1Config, "mnist_quickstart", {"train.steps": 200, "data.path": "my_digits"})

    The same as on the command line, where the fields are `--train.steps 200`. Raises UserError for a recipe of another
    stage, and for a field or value that there is not.
    """
    command, folder = RECIPES[config_class]
    words: list[str] = []
    for name, value in (changes or {}).items():
        words += [f"--{name}", as_word(value)]
    return read_recipe(command, config_class, folder, ["--config", str(recipe), *words])[0]


def as_word(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def train_stage1(config: Stage1Config, run: str | Path, *, device: str | None = None) -> FitResult:
    """Trains an autoencoder on images in the folder `run`, or continues there; the best weights are in `run/model`.
    device: "cpu", "cuda", "mps" ...; left out, the fastest there is. Raises UserError."""
    check_images(config.data.path)
    use_device(device, config.train.timeout_minutes)
    return stage1_vq.train.train_stage1(config, Path(run))


def train_vae(config: Stage1VAEConfig, run: str | Path, *, device: str | None = None) -> FitResult:
    """Trains a likelihood VAE; otherwise as `train_stage1`."""
    check_images(config.data.path)
    use_device(device, config.train.timeout_minutes)
    return stage1_vae.train.train_vae(config, Path(run))


def train_table(config: Stage1TableConfig, run: str | Path, *, device: str | None = None) -> FitResult:
    """Trains a likelihood VAE of a table; otherwise as `train_stage1`."""
    check_table(config.table.path)
    use_device(device, config.train.timeout_minutes)
    return stage1_vae.tables.train.train_table(config, Path(run))


def train_stage2(config: Stage2Config | Stage2LatentConfig, run: str | Path, *, device: str | None = None) -> FitResult:
    """Trains a prior on the code shards in `config.codes`, or one over latents on latent shards; otherwise as
    `train_stage1`. With `config.decoder` the previews show samples as images, and evaluations judge them."""
    codes = shards_of(config)
    use_device(device, config.train.timeout_minutes)
    if isinstance(config, Stage2LatentConfig):
        vae = None if config.decoder is None else load_decoder_of_latents(config.decoder, codes)
        shown, decode_latents = (None, None) if vae is None else (drawing_latents(vae), decoding_latents(vae))
        judge, notes = judge_of_samples(config.train, decode_latents, len(LatentDataset(codes, "validation")))
        return stage2_prior.train_latents.train_latents(config, codes, Path(run), shown, judge, notes)
    autoencoder = None if config.decoder is None else load_decoder(config.decoder, codes)
    draw, decode = (None, None) if autoencoder is None else (drawing(autoencoder), decoding(autoencoder))
    judge, notes = judge_of_samples(config.train, decode, len(CodeDataset(codes, "validation")))
    return stage2_prior.train.train_stage2(config, codes, Path(run), draw, judge, notes)


def check_images(path: str) -> None:
    """Raises UserError where a config names no images."""
    if not path:
        raise UserError(
            "data.path is empty: expected a folder of images, an .npz file or a name such as cifar10; give --data.path"
        )


def train_sequence(config: Stage1SequenceConfig, run: str | Path, *, device: str | None = None) -> FitResult:
    """Trains a likelihood VAE of sequences; otherwise as `train_stage1`."""
    use_device(device, config.train.timeout_minutes)
    return stage1_vae.sequences.train.train_sequence(config, Path(run))


def check_table(path: str) -> None:
    """Raises UserError where a config names no table."""
    if not path:
        raise UserError("table.path is empty: expected a CSV file with a header; give --table.path")


def shards_of(config: Stage2Config | Stage2LatentConfig) -> Path:
    """The folder that a config of stage two names. Raises UserError where it names none, and for another kind."""
    of_latents = isinstance(config, Stage2LatentConfig)
    if not config.codes:
        of = " of a VAE" if of_latents else ""
        raise UserError(f"codes is empty: expected a folder that `zellige encode` wrote{of}; give --codes")
    codes = Path(config.codes)
    if of_latents:
        advice = "name the folder that `zellige encode` wrote of a VAE"
        check_kind(codes, f"latent shards, as {an(config.model.kind)} models", advice, among=(LATENT_SHARDS,))
    else:
        advice = (
            "name the folder that `zellige encode` wrote; latents of a VAE take a recipe such as mnist_latents_mixture"
        )
        check_kind(codes, f"code shards, as {an(config.model.kind)} prior models", advice, among=(SHARDS,))
    return codes


def load_decoder(folder: str, codes: Path) -> Autoencoder:
    """The autoencoder that made the codes. Raises UserError for another one."""
    autoencoder = load_autoencoder(folder)
    check_made_by(CodeDataset(codes), autoencoder)
    return autoencoder.requires_grad_(False)


def load_decoder_of_latents(folder: str, latents: Path) -> LikelihoodVAE:
    """The VAE that made the latents. Raises UserError for another one."""
    vae = load_vae(folder)
    check_latents_of(LatentDataset(latents), vae)
    return vae.requires_grad_(False)


def decoding(autoencoder: Autoencoder) -> Callable[[Codes], Tensor]:
    """codes -> images, b c H W in [-1, 1], where the codes are."""

    def decode(codes: Codes) -> Tensor:
        return autoencoder.to(codes[0].device).decode(codes).float()

    return decode


def decoding_latents(vae: LikelihoodVAE) -> Callable[[Tensor], Tensor]:
    """latents -> images, b c H W in [-1, 1], where the latents are."""

    def decode(latents: Tensor) -> Tensor:
        return vae.to(latents.device).decode(latents).float()

    return decode


def drawing(autoencoder: Autoencoder) -> DrawCodes:
    """Decodes rows of codes and lays them out on a sheet with names, 3 H W."""

    def draw(rows: Sequence[Codes], names: Sequence[str], titles: Sequence[Sequence[str]]) -> Tensor:
        autoencoder.to(rows[0][0].device)
        pictures = [[to_pil(image) for image in autoencoder.decode(codes).float()] for codes in rows]
        return to_tensor(contact_sheet(pictures, names, titles, legible=PREVIEW_SIDE))

    return draw


def drawing_latents(vae: LikelihoodVAE) -> DrawLatents:
    """Decodes rows of latents and lays them out on a sheet with names, 3 H W."""

    def draw(rows: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        vae.to(rows[0].device)
        pictures = [[to_pil(image) for image in vae.decode(latents).float()] for latents in rows]
        return to_tensor(contact_sheet(pictures, names, legible=PREVIEW_SIDE))

    return draw
