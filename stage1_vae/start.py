"""Where a VAE begins with the weights of another: with all that fit, or with the networks of an autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.model_io import load_pretrained
from common.starting import take_weights
from stage1_vae.likelihoods import GaussianConfig
from stage1_vae.model import LikelihoodVAE
from stage1_vae.models import MODEL_CLASSES
from stage1_vae.vae import VAE, VAEConfig


def begin_from(model: LikelihoodVAE, folder: str | Path) -> tuple[tuple[str, ...], bool]:
    """Gives `model` the weights of the one in a run or model folder: all that fit of a model of its kind, the networks
    alone of a VAE with another kind of prior. Returns a line on it, if there is one, and whether the model needs no
    images to begin with. Raises UserError."""
    other = load_pretrained(folder, MODEL_CLASSES)
    alike = type(other) is type(model)
    if isinstance(model, VAE) and isinstance(other, VAE):
        alike = model.config.prior.kind == other.config.prior.kind
    if alike:
        return (take_weights(model, other).describe(str(folder), other),), True
    take_networks(model, folder)
    return (), False


def take_networks(model: LikelihoodVAE, folder: str | Path) -> None:
    """Gives `model` the encoder, posterior and decoder of the VAE in a run or model folder, not its prior. Raises
    UserError where the two would not compute the same of the same weights."""
    if not isinstance(model, VAE):
        raise UserError(
            f"start_from={folder} is no {model.kind}, expected a model of this kind; give --from {folder} in its place "
            "to train on what it is, or leave it out"
        )
    other = load_pretrained(folder, {VAE.kind: VAE})
    ours, theirs = dict(what_computes(model.config)), dict(what_computes(other.config))
    for name in ours:
        if ours[name] != theirs.get(name):
            raise UserError(
                f"start_from={folder} has model.{name}={theirs.get(name)}, expected {ours[name]}, as this training "
                "has it: give both trainings the same networks"
            )
    for part in ("encoder", "posterior_layer", "decoder"):
        taken, given = getattr(model, part), getattr(other, part).state_dict()
        if {key: tensor.shape for key, tensor in taken.state_dict().items()} != {
            key: tensor.shape for key, tensor in given.items()
        }:
            (height, width), (H, W) = other.image_size, model.image_size
            raise UserError(
                f"start_from={folder} is of images of {height}x{width} pixels, expected {H}x{W}, as this training has "
                "them: give both trainings the same networks"
            )
        taken.load_state_dict(given)


def what_computes(config: VAEConfig) -> Iterator[tuple[str, Any]]:
    """All settings that say what the encoder, the posterior and the decoder compute of their weights, by their names.
    None of them are what weights are before they learn, and how wide a Gaussian likelihood is, unless the decoder says
    that relative to it."""
    fields, likelihood = asdict(config), config.likelihood
    without = {"posterior.gate_bias"}
    if isinstance(likelihood, GaussianConfig) and likelihood.variance != "per_pixel":
        without |= {"likelihood.scale", "likelihood.smallest_log_scale"}
    for part in ("channels", "holes", "latents", "encoder", "posterior", "decoder", "likelihood"):
        for name, value in flattened(part, fields[part]):
            if name not in without:
                yield name, value


def flattened(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flattened(f"{path}.{name}", inner)
    else:
        yield path, tuple(value) if isinstance(value, list) else value
