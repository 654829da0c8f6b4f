"""Images to code shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codes.shard_folder import INDEX_NAME
from codes.shards import CodeIndex, CodeShardWriter
from codes.spec import Codes
from common.model_io import load_pretrained
from common.processes import process_state, use_device
from images.datasets import ImageDataset, image_datasets, to_float
from images.encoding import EncodeConfig, Piece, PieceBatches, data_config, left_out, write_shards
from images.files import BAD_FILES_NAME
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.autoencoders.base import Autoencoder
from training.launcher import check_launcher_of_models


def encode(config: EncodeConfig) -> str:
    """Does what the config says; returns one line that tells what was made and where. Raises UserError."""
    check_launcher_of_models()
    use_device(config.device)
    autoencoder = load_pretrained(config.model, AUTOENCODERS)
    data = data_config(config, autoencoder.image_size, autoencoder.channels)
    out = Path(config.out)
    datasets = image_datasets(data, config.seed, bad_files=out / BAD_FILES_NAME)
    index = encode_images(
        autoencoder,
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
        f"{index.code_spec.describe()}, {index.code_spec.bits_per_image:.0f} bits per image, in {out}"
        f"{left_out(encoded, *datasets, config.augment_copies, out / BAD_FILES_NAME)}"
        f"; next: zellige train-stage2 --config RECIPE --codes {out}"
    )


def encode_images(
    autoencoder: Autoencoder,
    train: ImageDataset,
    validation: ImageDataset,
    out: Path,
    *,
    augment_copies: int = 1,
    batch_size: int = 64,
    shard_size: int = 8192,
    workers: int = 0,
) -> CodeIndex:
    """Writes the folder `out` of code shards, or what it lacks, as `images.encoding.write_shards` does. Raises
    UserError."""

    def open_writer(pieces: Sequence[Piece], source: dict[str, Any], defaults: dict[str, Any]) -> CodeShardWriter:
        return CodeShardWriter(
            out,
            autoencoder.code_spec(train.config.height, train.config.width),
            [piece.split for piece in pieces],
            class_names=train.class_names,
            stage1_fingerprint=autoencoder.codes_fingerprint(),
            source=source,
            source_defaults=defaults,
            latents=autoencoder.scale_latents(),
            codes_are_bits=autoencoder.codes_are_bits(),
        )

    def encode_one(piece: Piece, batches: PieceBatches) -> tuple[Codes, Tensor, list[str]]:
        return encode_piece(autoencoder.to(process_state().device).eval(), piece, batches)

    write_shards(
        out,
        train,
        validation,
        open_writer,
        encode_one,
        augment_copies=augment_copies,
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
    )
    return CodeIndex.read(out / INDEX_NAME)


@torch.inference_mode()
def encode_piece(autoencoder: Autoencoder, piece: Piece, batches: PieceBatches) -> tuple[Codes, Tensor, list[str]]:
    """Codes (one `b h w` per grid), labels (b) and names (b) of a piece's readable images, on the CPU: they leave the
    device together."""
    device = next(autoencoder.parameters()).device
    grids = autoencoder.code_spec(piece.dataset.config.height, piece.dataset.config.width).grids
    codes = [[torch.empty(0, grid.height, grid.width, dtype=torch.int64, device=device)] for grid in grids]
    indices: list[int] = []
    for images, found in batches:
        for parts, grid_codes in zip(codes, autoencoder.encode(to_float(images)), strict=True):
            parts.append(grid_codes)
        indices += found
    labels = torch.from_numpy(piece.dataset.labels[indices])
    return tuple(torch.cat(parts).cpu() for parts in codes), labels, piece.dataset.names(indices)
