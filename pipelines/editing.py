"""What the commands share that change images: the model, and images as it takes them, whole or with what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from codes.spec import CodeSpec
from common.computing import check_device
from common.errors import UserError
from common.processes import on_main_process, process_state
from images.files import open_upright, read_size
from pipelines.devices import open_device
from pipelines.image_folders import image_names, to_images
from pipelines.image_input import fit
from pipelines.labels import class_number
from pipelines.masks import (
    PARTS,
    Box,
    check_keeps_some,
    check_proportions,
    fitted_mask,
    pasted,
    read_mask,
    rectangle,
    scaled_mask,
    window_around,
)
from pipelines.pictures import to_pil
from pipelines.sampling_options import DrawingOptions
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.sampling_config import SamplingConfig

CHECKED = 10_000  # images whose proportions are compared with a mask's before anything is drawn
LARGEST_REACH = 64  # pixels of a large photo over which the border of what is drawn fades out


class Frame(NamedTuple):
    """What a model asks of images."""

    image_height: int
    image_width: int
    image_channels: int


@dataclass(frozen=True)
class Drawing:
    """A model, and what it is asked to draw."""

    pipeline: TwoStagePipeline
    label: int | None
    sampling: SamplingConfig
    options: DrawingOptions

    @property
    def spec(self) -> CodeSpec:
        return self.pipeline.prior.code_spec

    @property
    def settings(self) -> dict[str, Any]:
        """Of the pipeline's methods."""
        chosen = {"labels": self.label, "prompts": self.options.prompt}
        return {**chosen, "seed": self.options.seed, "sampling": self.sampling}

    @property
    def record(self) -> dict[str, Any]:
        """What the images depend on, for settings.json."""
        chosen = {"label": self.label, "prompt": self.options.prompt, "seed": self.options.seed}
        return {"model": self.pipeline.fingerprint(), **self.sampling.record, **chosen}


def open_drawing(model: str, options: DrawingOptions, recorded: Mapping[str, Any]) -> Drawing:
    """recorded: settings of the place that the images go to. Raises UserError for a model that cannot draw what is
    asked for."""
    _, device = open_device(options.device)
    pipeline = TwoStagePipeline.from_pretrained(model).to(device)
    if options.text_encoder is not None:
        pipeline.load_text_encoder(options.text_encoder)
    label = class_number(pipeline.class_names, options.label)
    sampling = options.sampling(pipeline.sampling, recorded)
    check_device(device, sampling.precision, sampling.decoding)
    sampling.check_fits(pipeline.prior)
    if options.guidance not in (None, 1) and pipeline.num_classes and label is None and options.prompt is None:
        raise UserError(f"guidance={options.guidance} without a label, expected a class to follow; give a label")
    return Drawing(pipeline, label, sampling, options)


@dataclass(frozen=True)
class View:
    """What the model sees of a picture, and what of it stays."""

    image: Tensor  # c H W, of the size that the model makes
    keep: Tensor | None  # H W bool; None where no pixel is meant
    whole: Tensor | None = None  # c H W at the picture's own size, where the result is to have that; else None
    whole_keep: Tensor | None = None  # H W bool, of `whole`
    window: Box | None = None  # the part of `whole` that `image` shows

    def shown(self) -> Image.Image:
        """The picture with what does not stay in grey."""
        image, keep = (self.image, self.keep) if self.whole is None else (self.whole, self.whole_keep)
        return to_pil(image if keep is None else image.where(keep, 0.0))

    def original(self) -> Image.Image:
        return to_pil(self.image if self.whole is None else self.whole)

    def enlarged(self, drawn: Tensor, reach: int) -> Tensor:
        """An image c H W of the model's size as a part of the picture at its own size, whose kept pixels stay. reach:
        pixels of the model's image over which the border fades out."""
        assert self.whole is not None
        assert self.whole_keep is not None
        assert self.window is not None
        box, result = self.window, self.whole.clone()
        size, factor = (box.height, box.width), box.height / drawn.shape[1]
        grown = F.interpolate(drawn[None].cpu(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        reach = min(LARGEST_REACH, max(1, round(reach * factor)))
        part = pasted(grown, box.of(self.whole)[None], box.of(self.whole_keep)[None], reach)
        box.of(result).copy_(part[0])
        return result


def read_picture(path: Path, channels: int) -> Image.Image:
    """Raises BadImageError, or UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"there is no image file {path}; check the path")
    return open_upright(path, channels)


def read_view(path: Path, spec: CodeSpec | Frame) -> View:
    """An image scaled and cropped to the model's size. Raises BadImageError, or UserError where there is none."""
    return View(to_images(fit(read_picture(path, spec.image_channels), spec.image_height, spec.image_width))[0], None)


def read_kept_view(path: Path, spec: CodeSpec | Frame, keep: str, own_size: bool) -> View:
    """An image scaled and cropped to the model's size, or, for a result of its own size, the part of it around what is
    to be drawn. keep: one of `PARTS`, or a mask. Raises BadImageError, or UserError for a mask that is not the image's,
    and for one that keeps nothing or everything of it."""
    height, width = spec.image_height, spec.image_width
    picture = read_picture(path, spec.image_channels)
    mask = None if keep in PARTS else read_mask(Path(keep))
    if mask is not None:
        check_proportions(mask, picture.height, picture.width, f"the mask {keep}", str(path))
        mask = scaled_mask(mask, picture.height, picture.width)
    if not own_size:
        kept = rectangle(height, width, keep) if mask is None else fitted_mask(mask, height, width)
        check_keeps_some(kept, f"the mask {keep}, as far as {path} is in the middle that the model makes,")
        return View(to_images(fit(picture, height, width))[0], kept)
    whole_keep = rectangle(picture.height, picture.width, keep) if mask is None else mask
    box = window_around(whole_keep, height, width, str(path))
    cut = picture.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    image = to_images(cut.resize((width, height), Image.Resampling.BICUBIC))[0]
    kept = scaled_mask(box.of(whole_keep), height, width)
    check_keeps_some(kept, f"the mask {keep}, at the size that the model makes,")
    return View(image, kept, to_images(picture)[0], whole_keep, box)


def check_mask(keep: str, images: str) -> None:
    """Before anything is drawn: raises UserError unless `keep` is one of `PARTS`, or a mask that keeps something, not
    everything, and has the proportions of the images of a folder, the first ones of many, or of the one file."""
    if keep in PARTS:
        return
    mask, source = read_mask(Path(keep)), Path(images)
    check_keeps_some(mask, f"the mask {keep}")

    def check() -> None:
        for path in [source] if source.is_file() else [source / name for name in image_names(source)[:CHECKED]]:
            height, width = read_size(path)
            if height and width:  # what cannot be read is told later
                check_proportions(mask, height, width, f"the mask {keep}", str(path))

    on_main_process(process_state(), check)


def check_variants(variants: int) -> None:
    if variants < 1:
        raise UserError(f"variants={variants}, expected at least 1 of each image")


def check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"{name}={share}, expected a share from 0 to 1")
