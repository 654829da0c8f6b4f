"""How good the image of a `.zlg` file is, held against the one that it was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.errors import UserError
from images.files import BadImageError, open_upright
from metrics.similarity import SSIM_WINDOW, decibels, ssim
from pipelines.codec.archive import Archive, read_archive
from pipelines.codec.codec import Codec
from pipelines.codec.lossless_archive import open_lossless
from pipelines.codec.models import Models
from pipelines.devices import open_device
from pipelines.image_folders import to_images
from pipelines.pictures import to_pil


def with_model(
    data: bytes, title: str, models: tuple[str | None, str | None], against: str | None, device: str | None
) -> list[str]:
    """Lines on what only the model of a file tells. models: the model, or in its place a folder that holds it; against:
    the image. Raises UserError where the model is not there, and for another image."""
    archive = read_archive(data, title)
    codec = Models(*models, open_device(device)[1]).for_archive(archive, title)
    kinds = [codec.autoencoder.kind, *([codec.prior.kind] if codec.prior is not None else [])]
    lines = [f"the model is here: {' and '.join(kinds)}"]
    return lines if against is None else [*lines, quality(codec, archive, data, Path(against), title)]


def with_vae(path: Path, models: tuple[str | None, str | None], device: str | None) -> str:
    """A line on the model of a file of mode lossless. Raises UserError where it is not there."""
    with open_lossless(path) as file:
        codec = Models(*models, open_device(device)[1]).for_lossless(file)
    likelihood = codec.vae.config.likelihood.kind
    return f"the model is here: {codec.vae.kind} with the likelihood {likelihood}"


def quality(codec: Codec, archive: Archive, data: bytes, against: Path, title: str) -> str:
    """PSNR and SSIM of the one image of a file. Raises UserError for another image."""
    if len(archive.entries) > 1:
        raise UserError(f"{title} holds {len(archive.entries)} images, expected one to be held against {against}")
    try:
        original = open_upright(against, codec.autoencoder.channels)
    except BadImageError as error:
        raise UserError(f"{against} cannot be read as an image ({error}); name the one that was compressed") from error
    shape = archive.entries[0].shape
    if (original.height, original.width) != (shape.height, shape.width):
        raise UserError(
            f"{against} has {original.height}x{original.width} pixels, {title} {shape.height}x{shape.width}; name the "
            "image that was compressed"
        )
    decoded = to_pil(codec.decompress(data, title=title)[0])
    psnr = decibels(np.asarray(original), np.asarray(decoded))
    similarity = ssim(to_images(decoded), to_images(original))
    return ("PSNR: equal" if psnr is None else f"PSNR: {psnr:.2f} dB") + (
        f", SSIM: {float(similarity[0]):.4f}"
        if similarity is not None
        else f"; no SSIM, whose windows of {SSIM_WINDOW}x{SSIM_WINDOW} pixels are larger than the image"
    )
