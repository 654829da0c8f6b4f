"""`zellige inpaint`, `vary` and `interpolate`: images that are partly given, the rest drawn by the prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from codes.spec import CodeSpec
from common.errors import UserError
from common.files import remove_leftovers_below, write_json
from images.files import BadImageError, open_upright, scale_to_cover
from pipelines.devices import open_device
from pipelines.image_folders import image_names, target_names, to_images
from pipelines.known_codes import rectangle
from pipelines.labels import class_number
from pipelines.pictures import contact_sheet, save_png, to_pil
from pipelines.settings import SETTINGS_NAME, check_apart, check_settings
from pipelines.two_stage import TwoStagePipeline

SHEET_NAME = "sheet.png"
SHEET_ROWS = 16
PARTS = ("left", "right", "top", "bottom", "middle")


@dataclass(frozen=True, kw_only=True)
class InpaintConfig:
    """Draws what is not kept of images, in several variants. With `keep=middle` it paints outwards."""

    model: str  # assembled model, or a hub id
    images: str  # folder of images, or one image file; scaled and cropped to the size that the model makes
    out: str  # folder for NAME_VARIANT.png and sheet.png
    keep: str = "left"  # left, right, top or bottom half, middle, or an image file that is white where pixels stay
    variants: int = 4  # of each image
    label: int | str | None = None  # class to draw; left out: any
    seed: int = 0
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        check_variants(self.variants)


@dataclass(frozen=True, kw_only=True)
class VaryConfig:
    """Draws a share of the codes of images anew, in several variants."""

    model: str  # assembled model, or a hub id
    images: str  # folder of images, or one image file; scaled and cropped to the size that the model makes
    out: str  # folder for NAME_VARIANT.png and sheet.png
    share: float = 0.3  # of the codes that is drawn anew
    variants: int = 4  # of each image
    label: int | str | None = None  # class to draw; left out: any
    seed: int = 0
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        check_variants(self.variants)
        check_share("share", self.share)


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig:
    """Walks from one image to another, code by code."""

    model: str  # assembled model, or a hub id
    first: str  # image file
    second: str  # image file
    out: str  # folder for step_NN.png and sheet.png
    steps: int = 9  # images, the first and the second included
    redrawn: float = 0.2  # share of the codes between them that the prior draws, so that both mix
    label: int | str | None = None  # class to draw; left out: any
    seed: int = 0
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"steps={self.steps}, expected at least 2: the first image and the second")
        check_share("redrawn", self.redrawn)


def check_variants(variants: int) -> None:
    if variants < 1:
        raise UserError(f"variants={variants}, expected at least 1 of each image")


def check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"{name}={share}, expected a share from 0 to 1")


def inpaint_files(config: InpaintConfig) -> str:
    """Writes `variants` PNG files for each image and a sheet: the original, what is kept of it, and the first variants
    in a row. Returns one line. Raises UserError."""
    pipeline, label = open_pipeline(config.model, config.label, config.device)
    spec = pipeline.prior.code_spec
    keep = kept_pixels(config.keep, spec)

    def draw(images: Tensor, first_index: int) -> Tensor:
        return pipeline.inpaint(images, keep, labels=label, seed=config.seed, first_index=first_index).images

    grey = torch.zeros(())  # what is not kept, on the sheet
    settings = {"model": pipeline.fingerprint(), **asdict(pipeline.sampling), "keep": config.keep, "label": label}
    return write_variants(config, spec, settings, draw, shown=lambda image: torch.where(keep, image, grey))


def vary_files(config: VaryConfig) -> str:
    """As `inpaint_files`, for a random share of the codes."""
    pipeline, label = open_pipeline(config.model, config.label, config.device)

    def draw(images: Tensor, first_index: int) -> Tensor:
        varied = pipeline.vary(images, config.share, labels=label, seed=config.seed, first_index=first_index)
        return varied.images

    settings = {"model": pipeline.fingerprint(), **asdict(pipeline.sampling), "share": config.share, "label": label}
    return write_variants(config, pipeline.prior.code_spec, settings, draw)


def interpolate_files(config: InterpolateConfig) -> str:
    """Writes a PNG file for each step and all of them in one row. Returns one line. Raises UserError."""
    pipeline, label = open_pipeline(config.model, config.label, config.device)
    spec, out = pipeline.prior.code_spec, Path(config.out)
    for name in (config.first, config.second):
        check_apart(out, Path(name))
    try:
        first, second = (read_fitting(Path(name), spec) for name in (config.first, config.second))
    except BadImageError as error:
        raise UserError(f"{config.first} or {config.second} cannot be read: {error}; name other images") from error
    images = pipeline.interpolate(
        first, second, config.steps, redrawn=config.redrawn, labels=label, seed=config.seed
    ).images
    pictures = [to_pil(image) for image in images]
    for step, picture in enumerate(pictures):
        save_png(picture, out / f"step_{step:02d}.png")
    save_png(contact_sheet([pictures]), out / SHEET_NAME)
    return f"{len(pictures)} images from {config.first} to {config.second} in {out}, in a row on {out / SHEET_NAME}"


def write_variants(
    config: InpaintConfig | VaryConfig,
    spec: CodeSpec,
    settings: dict[str, Any],
    draw: Callable[[Tensor, int], Tensor],
    shown: Callable[[Tensor], Tensor] | None = None,
) -> str:
    """settings: what else the images depend on, for the record. draw: (images b c H W, number of the first sample) ->
    images. Image i of the folder has the samples from i * variants on. shown: what the sheet shows of an original
    beside it."""
    source, out, variants = Path(config.images), Path(config.out), config.variants
    check_apart(out, source)
    names = image_names(source)
    settings = {**settings, "images": str(source.resolve()), "variants": variants, "seed": config.seed}
    check_settings(out, settings)
    remove_leftovers_below(out)
    write_json(out / SETTINGS_NAME, settings)
    root = source if source.is_dir() else source.parent
    targets = target_names(names)
    rows: list[Sequence[Image.Image]] = []
    unread = 0
    for number, name in enumerate(names):
        try:
            image = read_fitting(root / name, spec)
        except BadImageError:
            unread += 1
            continue
        images = draw(image.expand(variants, -1, -1, -1), number * variants)
        pictures = [to_pil(variant) for variant in images]
        for variant, picture in enumerate(pictures):
            save_png(picture, out / f"{targets[name].removesuffix('.png')}_{variant}.png")
        if len(rows) < SHEET_ROWS:
            rows.append([to_pil(image), *([to_pil(shown(image))] if shown else []), *pictures])
    if not rows:
        raise UserError(f"none of the images of {source} can be read; name a folder of images or an image file")
    save_png(contact_sheet(rows), out / SHEET_NAME)
    return f"{variants} variants of each of {len(names) - unread} images in {out}, the first on {out / SHEET_NAME}" + (
        f"; {unread} images could not be read" if unread else ""
    )


def open_pipeline(model: str, label: int | str | None, device: str | None) -> tuple[TwoStagePipeline, int | None]:
    """The model on its device, and the number of the class."""
    _, place = open_device(device)
    pipeline = TwoStagePipeline.from_pretrained(model).to(place)
    return pipeline, class_number(pipeline.class_names, label)


def read_fitting(path: Path, spec: CodeSpec) -> Tensor:
    """An image scaled and cropped to the model's size: c H W, float32 in [-1, 1]. Raises BadImageError, or UserError
    where there is no such file."""
    if not path.is_file():
        raise UserError(f"there is no image file {path}; check the path")
    height, width = spec.image_height, spec.image_width
    picture = scale_to_cover(open_upright(path, spec.image_channels), height, width)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return to_images(picture.crop((left, top, left + width, top + height)))[0]


def kept_pixels(keep: str, spec: CodeSpec) -> Tensor:
    """`H W` bool, of a named part or of an image file, which is scaled to the model's size. Raises UserError."""
    height, width = spec.image_height, spec.image_width
    if keep in PARTS:
        return rectangle(height, width, keep)
    path = Path(keep)
    if not path.is_file():
        raise UserError(f"keep={keep} is neither a file nor one of {', '.join(PARTS)}; name a part, or a mask")
    try:
        mask = open_upright(path, 1).resize((width, height), Image.Resampling.NEAREST)
    except BadImageError as error:
        raise UserError(f"the mask {path} cannot be read: {error}; save it as PNG, white where pixels stay") from error
    return to_images(mask)[0, 0] > 0
