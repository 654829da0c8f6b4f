"""`zellige import`: an autoencoder, a VAE or a prior that another project published becomes a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.files import check_replaceable
from common.foreign_weights import (
    read_original_config,
    read_weights,
    read_weights_and_arguments,
    refusing_others,
)
from common.model_io import CONFIG_NAME, load_pretrained
from pipelines.captions import CaptionEncoder
from pipelines.model_folders import stage_folder
from stage1_vae import imports as vaes
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder, TATiTokConfig
from stage1_vq.imports import KINDS
from stage1_vq.imports.dalle import import_dalle, read_dalle_pickle
from stage1_vq.imports.taming import IN_NET2NET
from stage1_vq.imports.tatitok import import_tatitok, text_length_of
from stage2_prior import imports as stage2

FIRST_STAGES = {"ibq-gpt": "ibq", "open-magvit2-gpt": "open-magvit2"}  # in the files of these priors; else taming's


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A model folder from weights that another project published; docs/import.md says which, and where they are."""

    kind: Literal[
        "taming-vqgan",
        "taming-gumbelvq",
        "dalle",
        "llamagen-vq",
        "var-vqvae",
        "vqvae2",
        "diffusers-vqmodel",
        "titok",
        "tatitok",
        "ibq",
        "maskgit-vqgan",
        "open-magvit2",
        "infinity-vae",
        "taming-gpt",
        "taming-net2net",
        "llamagen-gpt",
        "rar",
        "randar",
        "ibq-gpt",
        "open-magvit2-gpt",
        "var",
        "infinity",
        "pixelsnail",
        "halton-maskgit",
        "titok-maskgit",
        "vdvae",
        "nvae",
        "titok-vae",
    ]  # the project and model that the weights are from
    weights: str  # the published file; for dalle encoder.pkl, or the folder of both files
    decoder: str | None = None  # dalle: decoder.pkl, if it is not beside the encoder
    config: str | None = None  # the original's constructor arguments, YAML or JSON; left out: told by the weights
    image_size: int | tuple[int, int] | None = None  # pixels, side of a square or (H, W); left out: the original's
    text_encoder: str | None = None  # tatitok: CLIP, a folder or hub id; left out: the published one, from the hub
    stage1: str | None = None  # priors: model folder of the first stage that they go with; left out: told by the files
    out: str  # the model folder to write


def import_weights(config: ImportConfig) -> str:
    """Writes the model folder `config.out`; returns one line. Raises UserError."""
    check_replaceable(Path(config.out), CONFIG_NAME)
    if config.decoder is not None and config.kind != "dalle":
        raise UserError(f"--decoder is for --kind dalle, whose model lies in two files; leave it out for {config.kind}")
    if config.text_encoder is not None and config.kind != "tatitok":
        raise UserError(
            f"--text_encoder is for --kind tatitok, whose decoder reads captions; leave it out for {config.kind}"
        )
    if config.kind in vaes.KINDS:
        return import_vae(config)
    return import_prior(config) if config.kind in stage2.KINDS else import_autoencoder(config)


def import_autoencoder(config: ImportConfig) -> str:
    if config.stage1 is not None:
        raise UserError(f"--stage1 is for priors, and {config.kind} is an autoencoder: leave it out")
    builders = {"dalle": dalle, "tatitok": tatitok}
    model = builders.get(config.kind, from_state_dict)(config)
    if config.image_size is not None:
        size = config.image_size
        model.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
    codes = model.code_spec().describe()  # raises UserError when the size does not fit
    folder = model.save_pretrained(config.out)
    return (
        f"{codes}: the {model.kind} model is in {folder}; "
        f"next: zellige encode --model {folder} --data.path DIR --out CODES"
    )


def import_vae(config: ImportConfig) -> str:
    for option, value in (("stage1", config.stage1), ("image_size", config.image_size)):
        if value is not None:
            raise UserError(f"--{option} is not for --kind {config.kind}, a VAE of images of one size; leave it out")
    kind, given = vaes.KINDS[config.kind], Path(config.weights)
    averaged = kind.averaged(given)
    weights, stored = read_weights_and_arguments(averaged or given, kind.places, kind.arguments)
    arguments = original_config(config) or stored
    with refusing_others(config.kind):
        model = kind.build(weights, arguments)
    folder = model.save_pretrained(config.out)
    taken = "" if averaged is None else f", of the averaged weights beside it, {averaged}"
    return (
        f"{', '.join(model.traits())}: the {model.kind} model is in {folder}{taken}; "
        f"next: zellige {kind.next.format(folder)}"
    )


def import_prior(config: ImportConfig) -> str:
    if config.image_size is not None:
        raise UserError(
            f"--image_size is for autoencoders, and {config.kind} is a prior: its images are those of the model that "
            "--stage1 names"
        )
    kind = stage2.KINDS[config.kind]
    weights = read_weights(Path(config.weights), kind.places)
    first_stage = None
    if config.stage1 is not None:
        autoencoder = load_pretrained(stage_folder(config.stage1, "stage1"), AUTOENCODERS)
        first_stage = stage2.FirstStage(autoencoder.code_spec(), autoencoder.fingerprint(), autoencoder.scale_latents())
    arguments = original_config(config)
    with refusing_others(config.kind):
        prior = kind.build(weights, arguments, first_stage)
    folder = prior.save_pretrained(config.out)
    before, stage1 = "", config.stage1 or "MODEL1"
    if config.stage1 is None and any(name.startswith(IN_NET2NET) for name in weights):
        stage1_kind = "taming-gumbelvq" if f"{IN_NET2NET}quantize.embed.weight" in weights else "taming-vqgan"
        stage1_kind = FIRST_STAGES.get(config.kind, stage1_kind)
        given = f" --config {config.config}" if config.config else ""
        before = (
            f"its first stage lies in the same file: zellige import --kind {stage1_kind} --weights {config.weights}"
            f"{given} --out {stage1}; "
        )
    one_or_all = '"[TOP, BOTTOM]"' if config.kind == "pixelsnail" else folder  # a prior of one level, or of all
    return (
        f"{prior.code_spec.describe()}: the {prior.kind} prior is in {folder}; {before}"
        f"next: zellige assemble --stage1 {stage1} --stage2 {one_or_all} --out MODEL"
    )


def original_config(config: ImportConfig) -> dict[str, Any] | None:
    return None if config.config is None else read_original_config(Path(config.config))


def from_state_dict(config: ImportConfig) -> Autoencoder:
    kind = KINDS[config.kind]
    weights, arguments = read_weights(Path(config.weights), kind.places), original_config(config)
    with refusing_others(config.kind):
        return kind.build(weights, arguments)


def tatitok(config: ImportConfig) -> Autoencoder:
    """With what its text encoder says of the empty caption, which its decoder reads where none is given."""
    weights = read_weights(Path(config.weights), KINDS["tatitok"].places)
    arguments = original_config(config)
    with refusing_others(config.kind):
        length = text_length_of(weights)
    encoder = CaptionEncoder.load(config.text_encoder or TATiTokConfig.text_encoder)
    no_text = encoder.of("", length)
    with refusing_others(config.kind):
        return import_tatitok(weights, arguments, no_text, config.text_encoder)


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
    parts = read_dalle_pickle(encoder), read_dalle_pickle(decoder)
    with refusing_others(config.kind):
        return import_dalle(*parts)
