"""What a demo draws from the latents of a VAE."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from pipelines.demo.drawing import Shown
from pipelines.demo.looking import as_taken
from pipelines.image_folders import to_images
from pipelines.latents.pipeline import LatentPipeline
from pipelines.one_by_one import sample_each
from pipelines.pictures import to_pil
from stage1_vae.model import Pixels
from stage1_vae.pictures import latent_walks, spread, walked

SAMPLES = 64  # from which it is told how active each number of the latents is


def generate(pipeline: LatentPipeline, seed: int, count: int, pixels: Pixels) -> Shown:
    """Samples 0 to `count` - 1 of the seed: the files of `zellige generate`."""
    pictures = sample_each(pipeline, range(count), seed, pixels, lambda _, picture: picture)
    return Shown(pictures, [f"seed {seed}, image {i}" for i in range(count)])


def interpolate(pipeline: LatentPipeline, first: Image.Image, second: Image.Image, steps: int) -> Shown:
    """A walk from one picture to another. Raises UserError."""
    start, end = (to_images(as_taken(pipeline, picture))[0] for picture in (first, second))
    made = pipeline.interpolate(start, end, steps).images
    return Shown(list(map(to_pil, made)), [f"{step / (steps - 1):.0%}" for step in range(steps)])


@torch.no_grad()
def activity(pipeline: LatentPipeline) -> Tensor:
    """By how much the mean of each number of the latents differs between images, n: its variance over samples."""
    images = pipeline.generate(SAMPLES).images
    return spread(pipeline.vae, pipeline.vae.encode(images))


@torch.no_grad()
def walk(pipeline: LatentPipeline, picture: Image.Image, number: int, reach: float, steps: int) -> Shown:
    """A picture whose latents are moved along one of their numbers, from -reach to reach. Raises UserError."""
    latents = pipeline.encode(to_images(as_taken(pipeline, picture)))
    if not 0 <= number < latents.numel():
        raise UserError(f"there is no number z{number}, expected z0 to z{latents.numel() - 1}")
    values = torch.linspace(-reach, reach, steps)
    made = pipeline.decode(walked(pipeline.vae, latents, number, values))
    return Shown(list(map(to_pil, made)), [f"z{number} = {value + 0.0:+.2f}" for value in values.tolist()])


def all_walks(pipeline: LatentPipeline, picture: Image.Image, variances: Tensor) -> Image.Image:
    """A row of images for each of the most active numbers."""
    image = to_images(as_taken(pipeline, picture))[0].to(pipeline.device)
    return latent_walks(pipeline.vae, image, variances)
