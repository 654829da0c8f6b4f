"""Images to latent shards: the posterior of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codes.latents import LatentIndex, LatentShardWriter, LatentSpec
from codes.shard_folder import INDEX_NAME
from common.errors import UserError
from common.model_io import load_pretrained
from common.processes import process_state, use_device
from images.datasets import ImageDataset, image_datasets, to_float
from images.encoding import EncodeConfig, Piece, PieceBatches, data_config, left_out, write_shards
from images.files import BAD_FILES_NAME
from stage1_vae.binarise import Binarised, binarise
from stage1_vae.model import LikelihoodVAE
from stage1_vae.models import MODEL_CLASSES
from stage1_vae.posteriors import DiagonalGaussian
from stage1_vae.vae import VAE
from training.launcher import check_launcher_of_models


def encode(config: EncodeConfig) -> str:
    """Does what the config says; returns one line that tells what was made and where. Raises UserError."""
    check_launcher_of_models()
    use_device(config.device)
    model = load_pretrained(config.model, MODEL_CLASSES)
    data = data_config(config, model.image_size, model.config.channels)
    if (data.height, data.width, data.channels) != (*model.image_size, model.config.channels):
        height, width = model.image_size
        raise UserError(
            f"data.image_size={data.image_size} and data.channels={data.channels}, expected images of {height}x{width}"
            f"x{model.config.channels}, the only ones that this VAE knows; leave data.image_size out"
        )
    out = Path(config.out)
    datasets = image_datasets(data, config.seed, bad_files=out / BAD_FILES_NAME)
    index = encode_images(
        model,
        *datasets,
        out,
        augment_copies=config.augment_copies,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        workers=config.workers,
    )
    encoded = sum(shard.images for shard in index.shards)
    return (
        f"{index.images('train')} training and {index.images('validation')} held-out images as "
        f"{index.latent_spec.describe()}, in {out}"
        f"{left_out(encoded, *datasets, config.augment_copies, out / BAD_FILES_NAME)}"
        f"; next: zellige train-stage2 --config RECIPE --codes {out}"
    )


def encode_images(
    model: LikelihoodVAE,
    train: ImageDataset,
    validation: ImageDataset,
    out: Path,
    *,
    augment_copies: int = 1,
    batch_size: int = 64,
    shard_size: int = 8192,
    workers: int = 0,
) -> LatentIndex:
    """Writes the folder `out` of latent shards, or what it lacks, as `images.encoding.write_shards` does. Images are
    made black and white as the model was trained, and once where training does it anew. Raises UserError."""
    binarised = model.binarised or Binarised("none", 0)
    spec = spec_of(model)

    def open_writer(pieces: Sequence[Piece], source: dict[str, Any], defaults: dict[str, Any]) -> LatentShardWriter:
        return LatentShardWriter(
            out,
            spec,
            [piece.split for piece in pieces],
            class_names=train.class_names,
            stage1_fingerprint=model.fingerprint(),
            source={**source, "binarised": binarised.how, "binarised_seed": binarised.seed},
            source_defaults=defaults,
        )

    @torch.inference_mode()
    def encode_piece(piece: Piece, batches: PieceBatches) -> tuple[dict[str, Tensor], Tensor, list[str]]:
        device = process_state().device
        model.to(device).eval()
        parts = {name: [torch.empty(0, *spec.shape)] for name in spec.names}
        indices: list[int] = []
        for images, found in batches:
            if binarised.how != "none":
                numbers = piece.dataset.indices[found].tolist()
                pixels = binarise(images.cpu().numpy(), binarised.how, binarised.seed, numbers)
                images = torch.from_numpy(pixels).to(device)
            latents = latents_of(model, to_float(images))
            together = torch.stack([latents[name].float() for name in spec.names]).cpu()  # one copy from the device
            for name, tensor in zip(spec.names, together, strict=True):
                parts[name].append(tensor)
            indices += found
        labels = torch.from_numpy(piece.dataset.labels[indices])
        return {name: torch.cat(found) for name, found in parts.items()}, labels, piece.dataset.names(indices)

    write_shards(
        out,
        train,
        validation,
        open_writer,
        encode_piece,
        augment_copies=augment_copies,
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
    )
    return LatentIndex.read(out / INDEX_NAME)


def latents_of(model: LikelihoodVAE, images: Tensor) -> dict[str, Tensor]:
    """What a latent shard holds of images b c H W, by the names of the LatentSpec, b *shape each."""
    posterior = of_one_group(model).posterior(images)
    if isinstance(posterior, DiagonalGaussian):
        return {"mean": posterior.mean, "log_scale": posterior.log_scale}
    return {"mean": posterior.mean}


@torch.inference_mode()
def spec_of(model: LikelihoodVAE) -> LatentSpec:
    """Of the latents of a VAE. Raises UserError for a hierarchy."""
    model, device = of_one_group(model), next(model.parameters()).device
    posterior = model.eval().posterior(torch.zeros(1, model.config.channels, *model.image_size, device=device))
    scales = isinstance(posterior, DiagonalGaussian)
    return LatentSpec(tuple(model.shape), scales, *model.image_size, model.config.channels)


def of_one_group(model: LikelihoodVAE) -> VAE:
    """Raises UserError for a hierarchy, and for a VAE of classes or several modalities."""
    if not isinstance(model, VAE):
        raise UserError(
            f"this model is of kind {model.kind}, whose latents no second prior learns, expected one of kind vae; "
            "zellige generate draws from it as it is"
        )
    return model
