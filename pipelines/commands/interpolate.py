"""`zellige interpolate`: a walk from one image to another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import UserError
from common.owned_folder import SHEET_NAME
from common.processes import process_state
from images.files import BadImageError
from pipelines.devices import open_device
from pipelines.editing import check_share, open_drawing, read_view
from pipelines.image_input import load_images
from pipelines.latents.models import is_vae
from pipelines.latents.pipeline import LatentPipeline
from pipelines.pictures import contact_sheet, save_png, to_pil
from pipelines.sampling_options import DrawingOptions
from pipelines.settings import check_apart, recorded_settings, results_folder
from stage2_prior.sampling_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(DrawingOptions):
    """Walks from one image to another, code by code, or through the latents of a VAE."""

    model: str  # assembled model, model or run folder of a VAE, or a hub id
    first: str  # image file
    second: str  # image file
    out: str  # folder for step_NN.png and sheet.png
    num: int = 9  # images, the first and the second included
    redrawn: float = 0.2  # share of the codes between them that the prior draws, so that both mix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num < 2:
            raise UserError(f"num={self.num}, expected at least 2: the first image and the second")
        check_share("redrawn", self.redrawn)


def interpolate_files(config: InterpolateConfig) -> str:
    """Writes a PNG file for each step and all of them in one row. Returns one line. Raises UserError."""
    out = Path(config.out)
    for name in (config.first, config.second):
        check_apart(out, Path(name))
    if is_vae(config.model):
        return walk_through_latents(config, out)
    drawing = open_drawing(config.model, config, recorded_settings(out))
    try:
        first, second = (read_view(Path(name), drawing.spec).image for name in (config.first, config.second))
    except BadImageError as error:
        raise UserError(f"{config.first} or {config.second} cannot be read: {error}; name other images") from error
    walk = drawing.pipeline.interpolate(first, second, config.num, redrawn=config.redrawn, **drawing.settings)
    pictures = [to_pil(image) for image in walk.images]
    files = {"first": str(Path(config.first).resolve()), "second": str(Path(config.second).resolve())}
    settings = {**drawing.record, **files, "num": config.num, "redrawn": config.redrawn}
    return write_walk(config, out, settings, pictures)


def walk_through_latents(config: InterpolateConfig, out: Path) -> str:
    """`interpolate_files` of a VAE: latents turn from those of one image to those of the other. Raises UserError for
    options of priors over codes."""
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ("model", "first", "second", "out", "num", "device"):
            raise UserError(f"{field.name}={value}, expected it left out: a VAE draws nothing between two images")
    _, device = open_device(config.device)
    pipeline = LatentPipeline.from_pretrained(config.model).to(device)
    size = pipeline.vae.image_size
    first, second = (
        load_images(name, size=size, channels=pipeline.vae.config.channels) for name in (config.first, config.second)
    )
    pictures = [to_pil(image) for image in pipeline.interpolate(first[0], second[0], config.num).images]
    files = {"first": str(Path(config.first).resolve()), "second": str(Path(config.second).resolve())}
    return write_walk(config, out, {"model": pipeline.vae.fingerprint(), **files, "num": config.num}, pictures)


def write_walk(config: InterpolateConfig, out: Path, settings: dict[str, Any], pictures: list[Image.Image]) -> str:
    with results_folder(out, "interpolate", settings, process_state(), defaults=SamplingConfig().record):
        for step, picture in enumerate(pictures):
            save_png(picture, out / f"step_{step:02d}.png")
        save_png(contact_sheet([pictures]), out / SHEET_NAME)
    return f"{len(pictures)} images from {config.first} to {config.second} in {out}, in a row on {out / SHEET_NAME}"
