"""What the latents of a VAE hold: the KL of each number, walks along them, samples, and the plane of two."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from images.datasets import to_float
from pipelines.latents.pipeline import LatentPipeline
from pipelines.pictures import to_pil
from pipelines.report.charts import Bars, bars
from pipelines.report.images import Shown
from pipelines.report.pictures import Picture, shown, strip, zoom_to
from stage1_vae.evaluation import ImageFigures, active_units, joined, judge, mean_of
from stage1_vae.hierarchies.base import HierarchicalVAE
from stage1_vae.pictures import has_plane, latent_plane, progressive, spread, walk_values, walks_from

DRAWS = 10  # of the latents of each image, for the ELBO
SIDE = 56
COLUMNS = 8
LEVEL_IMAGES = 8  # of the picture of levels


class Walk(NamedTuple):
    name: str  # `z17`
    picture: Picture


class Latents(NamedTuple):
    """What test images tell of the latents."""

    images: int
    title: str
    note: str  # what a person should know of the likelihood; may be empty
    elbo: float
    elbo_error: float
    rate: float
    distortion: float
    active: int
    numbers: int
    kl: Bars
    values: list[str]  # of the steps of walks
    walks: list[Walk]
    plane: Picture | None
    groups: Bars | None  # of a hierarchy: the KL of each group
    levels: Picture | None  # likewise: what it decodes by level


class VAESamples(NamedTuple):
    rows: list[Picture]
    drawn: int
    seed: int
    speed: float
    images: Tensor  # n c H W


def latents_of(pipeline: LatentPipeline, images: Shown, seed: int, batch_size: int, note: str) -> Latents:
    """note: what a person should know of the likelihood; may be empty."""
    vae = pipeline.vae
    parts = [
        judge(vae, to_float(pixels).to(pipeline.device), numbers, DRAWS, seed)
        for pixels, numbers in zip(images.pixels.split(batch_size), chunks(images.numbers, batch_size), strict=True)
    ]
    found: ImageFigures = joined(parts)
    kl = torch.cat([group.mean(dim=0).flatten() for group in found.kl])
    ordered = kl.sort(descending=True).values.clamp(min=0).tolist()
    means = torch.cat(found.means, dim=1)
    active = int(active_units(means).sum())
    elbo = mean_of(found.elbo, found.elbo_error)
    said = f"KL of {len(ordered)} numbers, the largest first: from {ordered[0]:.2f} to {ordered[-1]:.2f} nats."
    variances = spread(vae, means.float().to(pipeline.device).unflatten(1, vae.shape))
    first = to_float(images.pixels[0]).to(pipeline.device)
    walks = [
        Walk(f"z{number}", row_picture(decoded, f"Walk along z{number} from -3 to 3"))
        for number, decoded in walks_from(vae, first, variances)
    ]
    plane = None
    if has_plane(vae):
        sheet = latent_plane(vae, means.float(), images.labels)
        plane = Picture(sheet, "Left, what a grid of latents decodes to; right, where the images lie, by class")
    groups = levels = None
    if isinstance(vae, HierarchicalVAE):
        of_groups = [max(0.0, float(group.mean(dim=0).sum())) for group in found.kl]
        told = f"KL of {len(of_groups)} groups, the top one first: {', '.join(f'{one:.2f}' for one in of_groups)} nats."
        groups = bars("KL of each group of latents", of_groups, "groups, the top one first", "nats", told)
        some = to_float(images.pixels[:LEVEL_IMAGES]).to(pipeline.device)
        levels = Picture(progressive(vae, some), "What is decoded by level: above of images, below of samples")
    return Latents(
        len(images),
        images.title,
        note,
        elbo.value,
        elbo.images_error,
        float(found.total_kl.mean()),
        float(-found.log_likelihood.mean()),
        active,
        math.prod(vae.shape),
        bars("KL of each number of the latents", ordered, "numbers, the largest first", "nats", said),
        [f"{value + 0.0:+.1f}" for value in walk_values().tolist()],
        walks,
        plane,
        groups,
        levels,
    )


def chunks(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def row_picture(images: Tensor, alt: str) -> Picture:
    pictures = [shown(to_pil(image)) for image in images]
    return Picture(strip(pictures), alt, zoom_to(min(pictures[0].size), SIDE))


def draw(pipeline: LatentPipeline, seed: int, num: int, batch_size: int) -> VAESamples:
    began = time.perf_counter()
    images = pipeline.generate(num, seed=seed, batch_size=batch_size).images.cpu()
    speed = num / max(1e-9, time.perf_counter() - began)
    rows = [row_picture(part, f"{len(part)} samples") for part in images.split(COLUMNS)]
    return VAESamples(rows, num, seed, speed, images)
