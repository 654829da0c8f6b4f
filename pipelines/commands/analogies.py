"""`zellige analogies`: the style of an image in every class that a VAE knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.errors import UserError
from pipelines.devices import open_device
from pipelines.editing import View, read_picture
from pipelines.generation.results import Output
from pipelines.image_folders import to_images
from pipelines.image_input import fit
from pipelines.latents.pipeline import LatentPipeline
from pipelines.variants import each_alone, write_variants
from stage1_vae.labels.base import LabelledVAE


@dataclass(frozen=True, kw_only=True)
class AnalogiesConfig:
    """Keeps the style of images and changes their class, with a VAE that knows classes."""

    model: str  # run or model folder of an m2 or m1m2, or a hub id
    images: str  # folder of images, or one image file; scaled and cropped to the size of the model
    out: str  # folder for NAME_CLASS.png, CLASS a number, and sheet.png
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is


def analogy_files(config: AnalogiesConfig) -> str:
    """Writes each image in every class (`write_variants`). Returns one line. Raises UserError."""
    _, device = open_device(config.device)
    pipeline = LatentPipeline.from_pretrained(config.model).to(device)
    vae = pipeline.vae
    if not isinstance(vae, LabelledVAE):
        raise UserError(f"{config.model} is a VAE of kind {vae.kind}, which knows no classes; name an m2 or m1m2")

    def read(path: Path) -> View:
        return View(to_images(fit(read_picture(path, vae.config.channels), *vae.image_size))[0], None)

    def draw(view: View, number: int) -> Iterable[Tensor]:
        return pipeline.analogies(view.image[None])[0].cpu()

    record = {"model": vae.fingerprint()}
    count, output = vae.num_classes, Output(out=config.out)
    return write_variants("analogies", config.images, output, count, record, read, each_alone(draw, count))
