"""What a `.zlg` file depends on, as fingerprints: whatever else a model is, and however it was stored, may change.

Decoding reads the quantizer's code vectors and the decoder; the prior's probabilities come from its weights. Of their
configs it takes what shapes that arithmetic. Not the names of classes, the size of the training images, the encoder,
what training alone goes by, nor the type that weights are stored in: equal values are equal in every type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.model_io import said_by
from stage1_vae.model import LikelihoodVAE
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.priors import Prior

# Parts of the names of tensors that an autoencoder's `decode` and a prior's logits do not read.
ENCODING_ONLY = {"encoder", "encoders", "to_latents", "conditioners", "project_in", "logits"}
TRAINING_ONLY = {"cluster_sizes", "vector_sums", "steps_since_revival", "usage", "shares", "updates", "text_output"}
# Fields of configs that neither of them goes by.
NOT_READ = {
    # of autoencoders
    "data_variance",
    "l1_weight",
    "l2_weight",
    "backbone",
    "backbone_pretrained",
    # of quantizers
    "commitment_weight",
    "codebook_update",
    "decay",
    "epsilon",
    "gradient",
    "commitment",
    "orthogonal_weight",
    "diversity_weight",
    "diversity_temperature",
    "kmeans_iterations",
    "revive_after",
    "revive_below",
    "warn_usage_below",
    "init",
    "sample",
    "temperature_start",
    "temperature_end",
    "temperature_steps",
    "kl_weight",
    "kl_warmup_steps",
    # of priors
    "dropout",
    "residual_dropout",
    "attention_dropout",
    "drop_path",
    "initial_gain",
    "text_loss_weight",
}

# Types whose every value float32 holds. They are not compared with it: a processor that was told to take the smallest
# numbers for 0 (`torch.set_flush_denormal`, or a library that is loaded) does so in conversions from and to float64.
SHORT = (torch.float32, torch.float16, torch.bfloat16)


def decoding_fingerprint(autoencoder: Autoencoder) -> str:
    """SHA-256 of what turns codes into images."""
    said = {"kind": autoencoder.kind, "config": read_of(said_by(autoencoder.config))}
    unread = ENCODING_ONLY | TRAINING_ONLY
    weights = {name: tensor for name, tensor in autoencoder.state_dict().items() if not unread & set(name.split("."))}
    return fingerprint(said, weights)


def coding_fingerprint(prior: Prior) -> str:
    """SHA-256 of what a prior's probabilities come from."""
    said = {
        "kind": prior.kind,
        "config": read_of(said_by(prior.config)),
        "grids": [[grid.height, grid.width, grid.vocabulary] for grid in prior.code_spec.grids],
        "given": [[grid.height, grid.width, grid.vocabulary] for grid in prior.given],
        "classes": prior.num_classes,
        "text": prior.text and [prior.text.length, prior.text.vocabulary],
        "embeddings": prior.embeddings and [prior.embeddings.length, prior.embeddings.width],
    }
    weights = {name: t for name, t in prior.state_dict().items() if not TRAINING_ONLY & set(name.split("."))}
    return fingerprint(said, weights)


def lossless_fingerprint(vae: LikelihoodVAE) -> str:
    """SHA-256 of what the pixels of a VAE are coded by: all of it."""
    said = {"kind": vae.kind, "config": said_by(vae.config), "image_size": list(vae.image_size)}
    return fingerprint(said, vae.state_dict())


def read_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, and of those inside it, that decoding and coding go by."""
    return {
        name: read_of(value) if isinstance(value, dict) else value
        for name, value in said.items()
        if name not in NOT_READ
    }


def fingerprint(said: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of JSON and of tensors by their names: their shapes and values, little-endian float32 where that holds
    them, else float64."""
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        exact = tensor.detach().cpu()
        single, fits = exact.float(), exact.dtype in SHORT
        if not fits:
            exact = exact.double()
            fits = torch.equal(single.double(), exact)
        digest.update(f"{name} {'f4' if fits else 'f8'} {tuple(exact.shape)}".encode())
        digest.update((single.numpy() if fits else exact.numpy()).astype("<f4" if fits else "<f8").tobytes())
    return digest.hexdigest()
