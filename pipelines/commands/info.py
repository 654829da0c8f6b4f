"""`zellige info`: what a `.zlg` file holds, and how good it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from images.files import BadImageError, open_upright
from pipelines.codec.archive import Archive, read_archive, read_file
from pipelines.codec.codec import Codec
from pipelines.codec.models import Models
from pipelines.devices import open_device
from pipelines.figures import decibels, ssim
from pipelines.image_folders import to_images
from pipelines.pictures import to_pil

SHOWN_SHAPES = 5


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """What a .zlg file holds, how small it is, and how good."""

    file: str  # the .zlg file
    against: str | None = None  # the image it was made of: PSNR and SSIM; needs --model or --models
    model: str | None = None  # the model that compressed it
    models: str | None = None  # in place of model: a folder in which it is found by its fingerprint
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if self.model is not None and self.models is not None:
            raise UserError("expected one of --model MODEL and --models FOLDER, which holds the model; got both")
        if self.against is not None and self.model is None and self.models is None:
            raise UserError("against is given, but no model to decode the file with; give --model or --models")


def describe_file(config: InfoConfig) -> str:
    """Lines of text. Raises UserError when the file is damaged, or cannot be decoded where that is asked for."""
    path = Path(config.file)
    data = read_file(path)
    archive = read_archive(data, str(path))
    pixels = sum(entry.shape.height * entry.shape.width for entry in archive.entries)
    payloads = sum(entry.bits for entry in archive.entries)
    modes = Counter(entry.mode.name for entry in archive.entries)
    shapes = Counter(entry.shape for entry in archive.entries)
    lines = [
        f"{path}: {len(archive.entries)} image{'s' if len(archive.entries) > 1 else ''}, {len(data)} bytes "
        f"({-(-payloads // 8)} of codes), {8 * len(data) / pixels:.4f} bits per pixel",
        "mode: " + ", ".join(f"{mode} ({count})" if len(modes) > 1 else mode for mode, count in modes.items()),
    ]
    for shape, count in shapes.most_common(SHOWN_SHAPES):
        grids = " + ".join(f"{h}x{w} codes of {k}" for h, w, k in shape.grids)
        lines.append(f"{count} of {shape.height}x{shape.width} pixels: {grids}")
    if len(shapes) > SHOWN_SHAPES:
        lines.append(f"and images of {len(shapes) - SHOWN_SHAPES} sizes more")
    lines.append(f"autoencoder: {archive.stage1.hex()}")
    lines += [f"prior: {archive.prior.hex()}, on {archive.environment}"] if archive.prior else []
    lines += [f"tables: {archive.tables.hex()}"] if archive.tables else []
    if config.model is None and config.models is None:
        return "\n".join(lines)
    codec = Models(config.model, config.models, open_device(config.device)[1]).for_archive(archive, str(path))
    kinds = [codec.autoencoder.kind, *([codec.prior.kind] if codec.prior is not None else [])]
    lines.append(f"the model is here: {' and '.join(kinds)}")
    if config.against is not None:
        lines.append(quality(codec, archive, data, Path(config.against), str(path)))
    return "\n".join(lines)


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
    decoded = to_pil(codec.decompress(data)[0])
    psnr = decibels(np.asarray(original), np.asarray(decoded))
    similarity = ssim(to_images(decoded), to_images(original))
    return ("PSNR: equal" if psnr is None else f"PSNR: {psnr:.2f} dB") + (
        "" if similarity is None else f", SSIM: {float(similarity[0]):.4f}"
    )
