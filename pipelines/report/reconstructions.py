"""Originals beside what a model makes of their codes or latents, and where the two differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codes.spec import Codes
from images.datasets import to_float
from metrics.similarity import psnr, ssim
from pipelines.pictures import to_pil
from pipelines.report.images import Shown, evenly
from pipelines.report.pictures import Picture, heat, shown, zoom_to

SPREAD, WORST = 16, 8  # images that are shown: evenly spread ones, and those with the lowest PSNR
FULL_ERROR = 0.25  # mean error over the channels, as a share of the range of pixels, that is brightest on error maps
SIDE = 96  # pixels that small images are shown at


class Card(NamedTuple):
    """One image: what is given, what a model makes of it, and where they differ."""

    title: str
    original: Picture
    decoded: Picture
    error: Picture
    psnr: float


class Reconstructions(NamedTuple):
    title: str  # of the images
    images: int
    psnr: float  # mean over the images, dB
    psnr_low: float  # that of the worst
    ssim: float | None
    tabs: list[tuple[str, list[Card]]]
    full_error: float = FULL_ERROR


class Measured(NamedTuple):
    """What became of test images."""

    images: Shown
    figures: Reconstructions
    codes: Codes  # one n h w for each grid; of a VAE the means of its latents
    encode_speed: float  # images per second
    decode_speed: float


def reconstruct_images(
    images: Shown,
    encode: Callable[[Tensor], Codes],
    decode: Callable[[Codes], Tensor],
    batch_size: int,
    class_names: Sequence[str] | None,
) -> Measured:
    """encode: images b c H W in [-1, 1] to codes, or to a tuple of latents; decode: the reverse."""
    decoded, codes, errors, similarity = [], [], [], []
    seconds = {"encode": 0.0, "decode": 0.0}
    decode(encode(to_float(images.pixels[:1])))  # what is done once, at the first image, is no part of the speed
    for part in images.pixels.split(batch_size):
        batch = to_float(part)
        began = time.perf_counter()
        found = encode(batch)
        between = time.perf_counter()
        made = decode(found).float().cpu()
        seconds["encode"] += between - began
        seconds["decode"] += time.perf_counter() - between
        codes.append(tuple(grid.cpu() for grid in found))
        decoded.append(made)
        errors.append((made - batch).square().mean(dim=(1, 2, 3)))
        if (of_batch := ssim(made, batch)) is not None:
            similarity.append(of_batch)
    quality = psnr(torch.cat(errors))
    whole = torch.cat(decoded)
    worst = quality.argsort()[:WORST].tolist()
    tabs = [
        (name, [card(images, whole, quality, place, class_names) for place in places])
        for name, places in (("Evenly spread", evenly(SPREAD, len(images))), ("Lowest PSNR", worst))
    ]
    figures = Reconstructions(
        images.title,
        len(images),
        float(quality.mean()),
        float(quality.min()),
        float(torch.cat(similarity).mean()) if similarity else None,
        tabs,
    )
    joined = tuple(torch.cat(grids) for grids in zip(*codes, strict=True))
    speeds = [len(images) / max(1e-9, spent) for spent in seconds.values()]
    return Measured(images, figures, joined, *speeds)


def card(images: Shown, decoded: Tensor, quality: Tensor, place: int, class_names: Sequence[str] | None) -> Card:
    original = to_float(images.pixels[place])
    error = (decoded[place].clamp(-1, 1) - original).abs().mean(0).numpy() / 2
    label = int(images.labels[place])
    name = f"class {class_names[label]}" if class_names and 0 <= label < len(class_names) else ""
    title = f"image {images.numbers[place]}" + (f", {name}" if name else "")
    zoom = zoom_to(min(shown(to_pil(original)).size), SIDE)
    return Card(
        title,
        Picture(shown(to_pil(original)), f"Original, {title}", zoom),
        Picture(shown(to_pil(decoded[place])), f"Reconstruction of {title}", zoom),
        Picture(shown(heat(error / FULL_ERROR)), f"Error map of {title}", zoom),
        float(quality[place]),
    )


def error_scale() -> Picture:
    """The colours of error maps, from none to `FULL_ERROR`."""
    return Picture(heat(np.linspace(0, 1, 64)[None]), "Scale of the error maps, from no error to the largest", 1)
