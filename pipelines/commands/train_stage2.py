"""`zellige train-stage2`: a prior learns which codes follow which, or where the latents of images lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from codes.latents import LatentDataset
from codes.shards import CodeDataset
from codes.spec import Codes
from common.errors import UserError
from common.processes import use_device
from images.sheets import contact_sheet, to_pil, to_tensor
from pipelines.folder_kinds import LATENT_SHARDS, SHARDS, check_kind
from pipelines.latents.models import check_latents_of, load_vae
from pipelines.options import kind_of_model, read_recipe, split_device
from pipelines.stages import check_made_by, load_autoencoder
from stage1_vae.vae import VAE
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.train import DrawCodes, Stage2Config, train_stage2
from stage2_prior.train_latents import DrawLatents, Stage2LatentConfig, train_latents

PREVIEW_SIDE = 112  # pixels: smaller images are magnified in previews


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    if kind_of_model("train-stage2", "stage2", rest) in LATENT_PRIORS:
        return prepare_latents(device, rest)
    config, run = read_recipe("train-stage2", Stage2Config, "stage2", rest)
    if not config.codes:
        raise UserError("codes is empty: expected a folder that `zellige encode` wrote; give --codes")
    codes, decoder = Path(config.codes), config.decoder
    advice = "name the folder that `zellige encode` wrote; latents of a VAE take a recipe such as mnist_latents_mixture"
    check_kind(codes, f"code shards, as a {config.model.kind} prior models", advice, among=(SHARDS,))

    def train() -> str:
        use_device(device)
        draw = None if decoder is None else drawing(load_decoder(decoder, codes))
        return train_stage2(config, codes, run, draw).summary(following(decoder, run))

    return train


def prepare_latents(device: str | None, arguments: Sequence[str]) -> Callable[[], str]:
    """As `prepare`, of a prior over latents."""
    config, run = read_recipe("train-stage2", Stage2LatentConfig, "stage2", arguments)
    if not config.codes:
        raise UserError("codes is empty: expected a folder that `zellige encode` wrote of a VAE; give --codes")
    codes, decoder = Path(config.codes), config.decoder
    advice = "name the folder that `zellige encode` wrote of a VAE"
    check_kind(codes, f"latent shards, as a {config.model.kind} models", advice, among=(LATENT_SHARDS,))

    def train() -> str:
        use_device(device)
        draw = None if decoder is None else drawing_latents(load_decoder_of_latents(decoder, codes))
        return train_latents(config, codes, run, draw).summary(following(decoder, run))

    return train


def following(decoder: str | None, run: Path) -> str:
    """The command to give next."""
    return f"zellige assemble --stage1 {decoder or 'RUN'} --stage2 {run} --out MODEL"


def load_decoder(folder: str, codes: Path) -> Autoencoder:
    """The autoencoder that made the codes. Raises UserError for another one."""
    autoencoder = load_autoencoder(folder)
    check_made_by(CodeDataset(codes), autoencoder)
    return autoencoder.requires_grad_(False)


def load_decoder_of_latents(folder: str, latents: Path) -> VAE:
    """The VAE that made the latents. Raises UserError for another one."""
    vae = load_vae(folder)
    check_latents_of(LatentDataset(latents), vae)
    return vae.requires_grad_(False)


def drawing(autoencoder: Autoencoder) -> DrawCodes:
    """Decodes rows of codes and lays them out on a sheet with names, 3 H W."""

    def draw(rows: Sequence[Codes], names: Sequence[str], titles: Sequence[Sequence[str]]) -> Tensor:
        autoencoder.to(rows[0][0].device)
        pictures = [[to_pil(image) for image in autoencoder.decode(codes).float()] for codes in rows]
        return to_tensor(contact_sheet(pictures, names, titles, legible=PREVIEW_SIDE))

    return draw


def drawing_latents(vae: VAE) -> DrawLatents:
    """Decodes rows of latents and lays them out on a sheet with names, 3 H W."""

    def draw(rows: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        vae.to(rows[0].device)
        pictures = [[to_pil(image) for image in vae.decode(latents).float()] for latents in rows]
        return to_tensor(contact_sheet(pictures, names, legible=PREVIEW_SIDE))

    return draw
