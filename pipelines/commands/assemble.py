"""`zellige assemble`: an autoencoder or a VAE and its prior become one model folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from codes.spec import CodeSpec
from common.errors import UserError
from common.files import read_json
from common.model_io import load_pretrained
from pipelines.codec.shard_tables import tables_of_shards
from pipelines.codec.tables import CodeTables, load_tables
from pipelines.folder_kinds import check_draws_images
from pipelines.latents.models import is_vae, load_latent_prior, load_vae
from pipelines.latents.pipeline import LatentPipeline
from pipelines.model_folders import INDEX_NAME, stage_folder
from pipelines.sampling_options import SamplingOptions
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage2_prior.priors import PRIORS, Hierarchical, Prior
from stage2_prior.sampling_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class AssembleConfig(SamplingOptions):
    """One model folder from two runs, with the sampling settings that it will use by default."""

    stage1: str  # run or model folder of the autoencoder or VAE, a model that was assembled with it, or a hub id
    stage2: tuple[str, ...] | str | None = None  # of the prior; "[RUN, RUN ...]" of levels; left out: the VAE's own
    out: str  # the model folder to write
    codes: str | None = None  # code shards of this autoencoder, for tables that compress images without the prior
    decoder_steps: int | None = None  # of a model of kind flow_decoder or flextok; left out: as its settings say
    decoder_guidance: float | None = None  # of a model of kind flextok, 1: none; left out: as its settings say


def assemble(config: AssembleConfig) -> str:
    """Writes the pipeline folder `config.out`; returns one line. Raises UserError if the stages do not fit, or the
    levels of a prior do not belong together."""
    if is_vae(config.stage1):
        return assemble_vae(config)
    check_draws_images(Path(config.stage1))
    if config.stage2 is None:
        raise UserError(f"stage2 is left out, expected: run or model folder of the prior; {config.stage1} has none")
    autoencoder = load_pretrained(stage_folder(config.stage1, "stage1"), AUTOENCODERS)
    if config.decoder_steps is not None:
        autoencoder.decode_in_steps(config.decoder_steps)
    if config.decoder_guidance is not None:
        autoencoder.decode_guided(config.decoder_guidance)
    names = (config.stage2,) if isinstance(config.stage2, str) else config.stage2
    if not all(names):
        raise UserError("stage2 is empty, expected: run or model folder of the prior, or [RUN, RUN ...] of its levels")
    priors = [load_pretrained(stage_folder(name, "stage2"), PRIORS) for name in names]
    check_complete(autoencoder.code_spec(), priors)
    prior = priors[0] if len(priors) == 1 else Hierarchical.from_levels(priors)
    sampling = config.sampling(SamplingConfig())
    sampling.check_fits(prior)
    out = Path(config.out)
    former = former_fingerprint(out)
    tables = kept_tables(out, autoencoder) if config.codes is None else tables_of_shards(config.codes, autoencoder)
    pipeline = TwoStagePipeline(autoencoder, prior, sampling, tables)
    folder = pipeline.save_pretrained(out)
    return made(folder, former, pipeline.fingerprint())


def assemble_vae(config: AssembleConfig) -> str:
    """As `assemble`, of a VAE and a prior over its latents, or its own. Raises UserError."""
    asked = [field.name for field in fields(SamplingOptions) if getattr(config, field.name) is not None]
    asked += [name for name in ("codes", "decoder_steps", "decoder_guidance") if getattr(config, name) is not None]
    if asked:
        raise UserError(f"got {', '.join(asked)} for a VAE, expected none: they are of priors over codes")
    if config.stage2 is not None and not isinstance(config.stage2, str):
        raise UserError(f"stage2={config.stage2}, expected one run or model folder: a prior over latents has no levels")
    if config.stage2 == "":
        raise UserError("stage2 is empty, expected: run or model folder of the prior; leave it out for the VAE's own")
    prior = None if config.stage2 is None else load_latent_prior(config.stage2)
    pipeline = LatentPipeline(load_vae(config.stage1), prior)
    former = former_fingerprint(Path(config.out))
    return made(pipeline.save_pretrained(config.out), former, pipeline.fingerprint())


def former_fingerprint(out: Path) -> str | None:
    """Of the model that is replaced, if there is one."""
    return read_json(out / INDEX_NAME).get("fingerprint") if (out / INDEX_NAME).is_file() else None


def made(folder: Path, former: str | None, fingerprint: str) -> str:
    replaced = "" if former in (None, fingerprint) else ", in place of another one"
    return f"the model is in {folder}{replaced}; next: zellige generate --model {folder} --num 64 --out DIR"


def kept_tables(out: Path, autoencoder: Autoencoder) -> CodeTables | None:
    """The tables of the model that is replaced, if its autoencoder is the same."""
    with suppress(UserError):  # a damaged model is replaced all the same
        tables = load_tables(out) if (out / INDEX_NAME).is_file() else None
        if tables is not None:
            former = load_pretrained(out / "stage1", AUTOENCODERS)
            return tables if former.fingerprint() == autoencoder.fingerprint() else None
    return None


def check_complete(code_spec: CodeSpec, priors: Sequence[Prior]) -> None:
    """Raises UserError when `priors` are some of the levels of these codes and others are missing."""
    known = [grid for prior in priors for grid in prior.code_spec.grids]
    missing = [grid.name for grid in code_spec.grids if grid not in known]
    if missing and all(grid in code_spec.grids for prior in priors for grid in (*prior.given, *prior.code_spec.grids)):
        raise UserError(
            f"got priors of {' and '.join(grid.name for grid in known)} only, expected one of {' and '.join(missing)} "
            'too; train it by `zellige train-stage2 --level`, and name the runs of all levels, --stage2 "[RUN, RUN]"'
        )
