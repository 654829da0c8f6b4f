"""`zellige import`: an autoencoder that another project published becomes a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stage1_vq.autoencoders import Autoencoder
from stage1_vq.imports import KINDS
from stage1_vq.imports.dalle import import_dalle, read_dalle_pickle
from training.errors import UserError
from training.files import check_replaceable
from training.foreign_weights import read_original_config, read_weights
from training.model_io import CONFIG_NAME


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A model folder from weights that another project published; docs/import.md says which, and where they are."""

    kind: Literal[
        "taming-vqgan", "taming-gumbelvq", "dalle", "llamagen-vq", "var-vqvae", "vqvae2", "diffusers-vqmodel"
    ]  # the project and model that the weights are from
    weights: str  # the published file; for dalle encoder.pkl, or the folder of both files
    decoder: str | None = None  # dalle: decoder.pkl, if it is not beside the encoder
    config: str | None = None  # the original's constructor arguments, YAML or JSON; left out: told by the weights
    image_size: int | tuple[int, int] | None = None  # pixels, side of a square or (H, W); left out: the original's
    out: str  # the model folder to write


def import_weights(config: ImportConfig) -> str:
    """Writes the model folder `config.out`; returns one line. Raises UserError."""
    check_replaceable(Path(config.out), CONFIG_NAME)
    model = dalle(config) if config.kind == "dalle" else from_state_dict(config)
    if config.image_size is not None:
        size = config.image_size
        model.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
    codes = model.code_spec().describe()  # raises UserError when the size does not fit
    folder = model.save_pretrained(config.out)
    return (
        f"{codes}: the {model.kind} model is in {folder}; "
        f"next: zellige encode --model {folder} --data.path DIR --out CODES"
    )


def from_state_dict(config: ImportConfig) -> Autoencoder:
    if config.decoder is not None:
        raise UserError(f"--decoder is for --kind dalle, whose model lies in two files; leave it out for {config.kind}")
    kind = KINDS[config.kind]
    arguments = None if config.config is None else read_original_config(Path(config.config))
    return kind.build(read_weights(Path(config.weights), kind.places), arguments)


def dalle(config: ImportConfig) -> Autoencoder:
    """From encoder.pkl and decoder.pkl: their folder, or the first beside the second, or each by its option."""
    if config.config is not None:
        raise UserError("--config is not for --kind dalle, whose weights tell all; leave it out")
    given = Path(config.weights)
    encoder = given / "encoder.pkl" if given.is_dir() else given
    decoder = encoder.with_name("decoder.pkl") if config.decoder is None else Path(config.decoder)
    for path in (encoder, decoder):
        if not path.is_file():
            raise UserError(
                f"there is no file {path}; give --weights FOLDER with encoder.pkl and decoder.pkl in it, or --weights "
                "encoder.pkl --decoder decoder.pkl"
            )
    return import_dalle(read_dalle_pickle(encoder), read_dalle_pickle(decoder))
