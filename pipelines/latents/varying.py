"""Variants of images of which a hierarchy of latents draws groups anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.errors import UserError
from common.precision import Precision
from pipelines.devices import open_device
from pipelines.editing import View, read_picture
from pipelines.generation.results import Output
from pipelines.image_folders import to_images
from pipelines.image_input import fit
from pipelines.latents.pipeline import LatentPipeline
from pipelines.variants import each_alone, write_variants
from stage1_vae.hierarchies.base import HierarchicalVAE


class Redrawing(NamedTuple):
    """What variants depend on besides the model and the images."""

    share: float  # of the groups, from the lowest one up, if there are no `groups`
    groups: Sequence[int] | None  # that are drawn anew, 0 the top one
    temperature: float | Sequence[float]
    seed: int
    precision: Precision | None = None


def vary_latents(
    model: str, images: str, output: Output, variants: int, asked: Redrawing, device_name: str | None
) -> str:
    """Writes the variants of each image (`write_variants`). Returns one line. Raises UserError."""
    _, device = open_device(device_name)
    pipeline = LatentPipeline.from_pretrained(model).to(device)
    vae = pipeline.vae
    if not isinstance(vae, HierarchicalVAE):
        raise UserError(f"{model} is a VAE of one group of latents, expected a hierarchy, some of whose groups stay")
    pipeline.check_temperature(asked.temperature)
    pipeline.check_precision(asked.precision)
    count = len(vae.group_shapes)
    groups = asked.groups if asked.groups is not None else range(count - max(1, round(asked.share * count)), count)

    def read(path: Path) -> View:
        return View(to_images(fit(read_picture(path, vae.config.channels), *vae.image_size))[0], None)

    def draw(view: View, number: int) -> Tensor:
        first_index = number * variants
        return pipeline.vary(
            view.image,
            groups,
            variants,
            seed=asked.seed,
            first_index=first_index,
            temperature=asked.temperature,
            precision=asked.precision,
        ).images

    record = {
        "model": pipeline.fingerprint(),
        "groups": list(groups),
        "temperature": asked.temperature,
        "seed": asked.seed,
        "precision": asked.precision,
    }
    return write_variants("vary", images, output, variants, record, read, each_alone(draw, variants))
