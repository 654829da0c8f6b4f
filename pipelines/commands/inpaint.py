"""`zellige inpaint`: images of which a part stays, the rest drawn by the prior, or completed by a VAE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial

from torch import Tensor

from common.errors import UserError
from pipelines.editing import View, check_mask, check_variants, open_drawing, read_kept_view, write_variants
from pipelines.latents.completing import complete_files
from pipelines.latents.models import is_vae
from pipelines.sampling_options import DrawingOptions


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(DrawingOptions):
    """Draws what is not kept of images, in several variants. With `keep=middle` it paints outwards. A VAE that was
    trained on images with holes completes them by importance weights; options of priors are not for it."""

    model: str  # assembled model, VAE trained on images with holes (its run will do), or a hub id
    images: str  # folder of images, or one image file; scaled and cropped to the size that the model makes
    out: str  # folder for NAME_VARIANT.png and sheet.png
    keep: str = "left"  # left, right, top, bottom, middle, a file that is white where pixels stay; of a VAE also masks
    variants: int = 4  # of each image
    paste: bool = True  # put kept pixels back as they were; false: every pixel as decoded from the codes
    own_size: bool = False  # files of each image's own size: what is drawn is scaled up into it
    expected: bool = False  # of a VAE: one picture of each image, the mean of what may be there, in place of variants
    draws: int | None = None  # of a VAE: of each image's latents, which the weights are of; left out: 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variants(self.variants)
        if self.draws is not None and self.draws < 1:
            raise UserError(f"draws={self.draws}, expected at least 1; 500 is usual")
        if self.own_size and not self.paste:
            raise UserError("got own_size=true with paste=false, expected either: what is drawn is put into the image")


def inpaint_files(config: InpaintConfig) -> str:
    """Writes the variants of each image (`write_variants`). Returns one line. Raises UserError."""
    if is_vae(config.model):
        check_of_vae(config)
        return complete_files(
            config.model,
            config.images,
            config.out,
            keep=config.keep,
            variants=config.variants,
            expected=config.expected,
            draws=config.draws or 500,
            seed=config.seed,
            device=config.device,
        )
    if config.expected or config.draws is not None:
        raise UserError("expected and draws are for a VAE, and this is a model of codes; leave them out")
    check_mask(config.keep, config.images)
    drawing = open_drawing(config.model, config, config.out)
    pipeline = drawing.pipeline

    def draw(view: View, number: int) -> Iterable[Tensor]:
        assert view.keep is not None
        images, paste = view.image.expand(config.variants, -1, -1, -1), config.paste and view.whole is None
        settings = {"first_index": number * config.variants, **drawing.settings}
        made = pipeline.inpaint(images, view.keep, paste=paste, **settings).images
        return made if view.whole is None else (view.enlarged(image, pipeline.autoencoder.stride) for image in made)

    return write_variants(
        "inpaint",
        config.images,
        config.out,
        config.variants,
        {**drawing.record, "keep": config.keep, "paste": config.paste, "own_size": config.own_size},
        partial(read_kept_view, spec=drawing.spec, keep=config.keep, own_size=config.own_size),
        draw,
    )


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
