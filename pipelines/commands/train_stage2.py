"""`zellige train-stage2`: a prior learns which codes follow which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from codes.shards import CodeDataset
from codes.spec import Codes
from common.errors import UserError
from common.processes import use_device
from images.sheets import contact_sheet, to_pil, to_tensor
from pipelines.folder_kinds import SHARDS, check_kind
from pipelines.options import read_recipe, split_device
from pipelines.stages import check_made_by, load_autoencoder
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.train import DrawCodes, Stage2Config, train_stage2

PREVIEW_SIDE = 112  # pixels: smaller images are magnified in previews


def prepare(arguments: Sequence[str]) -> Callable[[], str]:
    """Reads and checks the arguments; what it returns trains and tells in one line what was made. Raises UserError."""
    device, rest = split_device(arguments)
    config, run = read_recipe("train-stage2", Stage2Config, "stage2", rest)
    if not config.codes:
        raise UserError("codes is empty: expected a folder that `zellige encode` wrote; give --codes")
    codes, decoder = Path(config.codes), config.decoder
    check_kind(codes, "code shards", "name the folder that `zellige encode` wrote", among=(SHARDS,))
    following = f"zellige assemble --stage1 {decoder or 'RUN'} --stage2 {run} --out MODEL"

    def train() -> str:
        use_device(device)
        draw = None if decoder is None else drawing(load_decoder(decoder, codes))
        return train_stage2(config, codes, run, draw).summary(following)

    return train


def load_decoder(folder: str, codes: Path) -> Autoencoder:
    """The autoencoder that made the codes. Raises UserError for another one."""
    autoencoder = load_autoencoder(folder)
    check_made_by(CodeDataset(codes), autoencoder)
    return autoencoder.requires_grad_(False)


def drawing(autoencoder: Autoencoder) -> DrawCodes:
    """Decodes rows of codes and lays them out on a sheet with names, 3 H W."""

    def draw(rows: Sequence[Codes], names: Sequence[str], titles: Sequence[Sequence[str]]) -> Tensor:
        autoencoder.to(rows[0][0].device)
        pictures = [[to_pil(image) for image in autoencoder.decode(codes).float()] for codes in rows]
        return to_tensor(contact_sheet(pictures, names, titles, legible=PREVIEW_SIDE))

    return draw
