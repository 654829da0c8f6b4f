"""Where a VAE begins with the networks of another: an autoencoder, trained before."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.model import LikelihoodVAE
from stage1_vae.vae import VAE


def take_networks(model: LikelihoodVAE, folder: str | Path) -> None:
    """Gives `model` the encoder, posterior and decoder of the VAE in a run or model folder, not its prior. Raises
    UserError where the two are not built alike."""
    if not isinstance(model, VAE):
        raise UserError(f"start_from={folder}, but model.kind={model.kind} starts from nothing; leave it out")
    other = load_pretrained(folder, {VAE.kind: VAE})
    for name in ("encoder", "posterior_layer", "decoder"):
        ours, theirs = getattr(model, name), getattr(other, name)
        shapes = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
        found = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
        if shapes != found:
            part = "decoder" if name == "decoder" else "encoder"
            raise UserError(
                f"start_from={folder} has the {part} {getattr(other.config, part)} for {other.config.latents} latents, "
                f"expected {getattr(model.config, part)} for {model.config.latents}: give both trainings the same "
                "networks"
            )
        ours.load_state_dict(theirs.state_dict())
