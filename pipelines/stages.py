"""Both stages of a model folder, and what belongs together: autoencoder, prior and code shards."""

from __future__ import annotations

from pathlib import Path

import torch

from codes.shards import CodeDataset
from common.errors import UserError
from common.files import read_json
from common.model_io import PretrainedModel, load_pretrained, weight_types
from pipelines.model_folders import INDEX_NAME, stage_folder
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage2_prior.latents import LatentPriorModel
from stage2_prior.priors import PRIORS, Prior

KIND = "two_stage"


def load_autoencoder(
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Autoencoder:
    """The autoencoder of an assembled model, of a run or model folder, or of a hub id. Arguments and
    errors: those of `common.model_io.load_pretrained`."""
    folder = stage_folder(folder_or_hub_id, "stage1", revision)
    return load_pretrained(folder, AUTOENCODERS, device=device, dtype=dtype)


def load_prior(
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Prior:
    """The prior of an assembled model, of a run or model folder, or of a hub id. Arguments and
    errors: those of `common.model_io.load_pretrained`."""
    folder = stage_folder(folder_or_hub_id, "stage2", revision)
    return load_pretrained(folder, PRIORS, device=device, dtype=dtype)


def load_stages(folder: Path) -> tuple[Autoencoder, Prior]:
    """The two models in the local folder of an assembled one. Raises UserError for a folder of something else, and for
    stages that do not fit."""
    kind = read_json(folder / INDEX_NAME).get("kind")
    if kind != KIND:
        raise UserError(f"{folder / INDEX_NAME} describes a {kind!r} pipeline, expected {KIND!r}")
    autoencoder = load_pretrained(folder / "stage1", AUTOENCODERS)
    prior = load_pretrained(folder / "stage2", PRIORS)
    check_fit(autoencoder, prior)
    return autoencoder, prior


def check_fit(autoencoder: Autoencoder, prior: Prior) -> None:
    """Raises UserError unless `prior` was trained on codes of exactly this autoencoder."""
    ours, theirs = autoencoder.code_spec(), prior.code_spec
    if ours != theirs:
        raise UserError(
            f"the two stages do not fit: the autoencoder makes {ours.describe()}, the prior was trained on "
            f"{theirs.describe()}; name the stage-one run whose codes the prior was trained on"
        )
    recorded, actual = prior.stage1_fingerprint, autoencoder.fingerprint()
    if recorded is not None and not autoencoder.knows_codes_of(recorded):
        raise UserError(
            f"the two stages do not fit: the prior was trained on codes of autoencoder {recorded[:12]}, "
            f"this one is {actual[:12]} (same shape, other weights); name the stage-one run whose "
            "codes the prior was trained on, or encode and train stage two again"
        )


def check_given(codes: CodeDataset, prior: Prior) -> str | None:
    """Raises UserError unless these are codes that the prior goes by: of the tokenizer whose codes it was trained with.
    Returns a note where that cannot be known, as the prior or the codes do not record it."""
    if not prior.given:
        raise UserError(f"given={codes.folder}, but this model goes by no other codes; leave given out")
    if codes.code_spec.grids != prior.given:
        wanted = " + ".join(f"{grid.height}x{grid.width} codes of {grid.vocabulary}" for grid in prior.given)
        raise UserError(
            f"{codes.folder} holds {codes.code_spec.describe()}, expected {wanted}, which this model goes by"
        )
    found, expected = codes.stage1_fingerprint, prior.given_fingerprint
    if not found or expected is None:
        missing = (
            "this model does not record whose it goes by" if expected is None else "they do not record their maker"
        )
        return (
            f"the given codes of {codes.folder} were compared by their shape only, for {missing}: those of another "
            "autoencoder would mean something else"
        )
    if found != expected:
        raise UserError(
            f"{codes.folder} holds codes of autoencoder {found[:12]}, and this model goes by those of {expected[:12]} "
            "(same shape, other meaning); encode the pictures with the autoencoder that it was trained with"
        )
    return None


def check_made_by(codes: CodeDataset, autoencoder: Autoencoder) -> None:
    """Raises UserError unless this autoencoder made the codes; of codes that do not say who did, only their shape is
    compared."""
    recorded, actual = codes.stage1_fingerprint, autoencoder.fingerprint()
    spec = autoencoder.code_spec(codes.code_spec.image_height, codes.code_spec.image_width)
    if codes.code_spec != spec or (recorded and not autoencoder.knows_codes_of(recorded)):
        raise UserError(
            f"{codes.folder} holds codes of autoencoder {recorded[:12]}, {codes.code_spec.describe()}, expected those "
            f"of {actual[:12]}, {spec.describe()}; encode images with this model"
        )


def note_cast(
    prior: Prior | LatentPriorModel, stage1: PretrainedModel, compared: tuple[PretrainedModel, dict[str, torch.dtype]]
) -> None:
    """Where a first stage was cast to another type since a prior was found to fit it, the prior, which records whose it
    is, goes with what it is now. compared: that first stage, and its types then (`weight_types`)."""
    known, types = compared
    if stage1 is known and types != weight_types(known) and prior.stage1_fingerprint is not None:
        prior.stage1_fingerprint = known.fingerprint()
