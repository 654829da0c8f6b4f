"""`zellige inpaint`: images of which a part stays, the rest drawn by the prior, or completed by a VAE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import sha256_of_file
from pipelines.devices import open_device
from pipelines.editing import View, check_mask, open_drawing, read_kept_view
from pipelines.generation.results import check_place, recorded_of
from pipelines.generation.store import open_store
from pipelines.latents.completing import complete_files
from pipelines.latents.models import is_vae
from pipelines.masks import PARTS
from pipelines.sampling_options import DrawingOptions
from pipelines.variants import RESULTS, VariantsOptions, in_batches, write_variants


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(VariantsOptions):
    """Draws what is not kept of images, in several variants. With `keep=middle` it paints outwards. A VAE that was
    trained on images with holes completes them by importance weights; options of priors are not for it."""

    model: str  # assembled model, VAE trained on images with holes (its run will do), or a hub id
    keep: str = "left"  # left, right, top, bottom, middle, a file that is white where pixels stay; of a VAE also masks
    paste: bool = True  # put kept pixels back as they were; false: every pixel as decoded from the codes
    own_size: bool = False  # files of each image's own size: what is drawn is scaled up into it
    expected: bool = False  # of a VAE: one picture of each image, the mean of what may be there, in place of variants
    draws: int | None = None  # of a VAE: of each image's latents, which the weights are of; left out: 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws is not None and self.draws < 1:
            raise UserError(f"draws={self.draws}, expected at least 1; 500 is usual")
        if self.own_size and not self.paste:
            raise UserError("got own_size=true with paste=false, expected either: what is drawn is put into the image")
        if self.own_size and self.format == "npz":
            raise UserError("got own_size=true with format=npz, expected either: an archive is of images of one size")


def inpaint_files(config: InpaintConfig) -> str:
    """Writes the variants of each image (`write_variants`). Returns one line. Raises UserError."""
    check_place(config.out)
    if is_vae(config.model):
        check_of_vae(config)
        return complete_files(
            config.model,
            config.images,
            config.output,
            keep=config.keep,
            variants=config.variants,
            expected=config.expected,
            draws=config.draws or 500,
            seed=config.seed,
            device=config.device,
        )
    if config.expected or config.draws is not None:
        raise UserError("expected and draws are for a VAE, and this is a model of codes; leave them out")
    open_device(config.device)
    check_mask(config.keep, config.images)
    drawing = open_drawing(config.model, config, recorded_of(open_store(config.out), RESULTS))
    pipeline = drawing.pipeline

    def draw(views: Sequence[View], batch: range) -> Iterable[Tensor]:
        images, keep = torch.stack([view.image for view in views]), torch.stack([kept_of(view) for view in views])
        paste = config.paste and not config.own_size
        made = pipeline.inpaint(images, keep, paste=paste, first_index=batch.start, **drawing.settings).images
        if not config.own_size:
            return made
        return (view.enlarged(image, pipeline.autoencoder.stride) for view, image in zip(views, made, strict=True))

    return write_variants(
        "inpaint",
        config.images,
        config.output,
        config.variants,
        {
            **drawing.record,
            "keep": config.keep,
            "mask": mask_of(config.keep),
            "paste": config.paste,
            "own_size": config.own_size,
        },
        partial(read_kept_view, spec=drawing.spec, keep=config.keep, own_size=config.own_size),
        in_batches(draw, config.variants),
        label=drawing.label,
    )


def kept_of(view: View) -> Tensor:
    assert view.keep is not None
    return view.keep


def mask_of(keep: str) -> str | None:
    """What tells that the file of a mask is another one."""
    return None if keep in PARTS else sha256_of_file(Path(keep))


def check_of_vae(config: InpaintConfig) -> None:
    """Raises UserError for options of a prior over codes, which a VAE has not."""
    given = [
        field.name
        for field in fields(DrawingOptions)
        if field.name not in ("seed", "device") and getattr(config, field.name) is not None
    ]
    given += [name for name, value in (("paste", not config.paste), ("own_size", config.own_size)) if value]
    if given:
        raise UserError(
            f"got {', '.join(given)} for a VAE, expected none of these: they are of models of codes; leave them out"
        )
