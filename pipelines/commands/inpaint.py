"""`zellige inpaint`: images of which a part stays, the rest drawn by the prior."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from common.errors import UserError
from pipelines.editing import View, check_mask, check_variants, open_drawing, read_kept_view, write_variants
from pipelines.sampling_options import DrawingOptions


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(DrawingOptions):
    """Draws what is not kept of images, in several variants. With `keep=middle` it paints outwards."""

    model: str  # assembled model, or a hub id
    images: str  # folder of images, or one image file; scaled and cropped to the size that the model makes
    out: str  # folder for NAME_VARIANT.png and sheet.png
    keep: str = "left"  # left, right, top or bottom half, middle, or an image file that is white where pixels stay
    variants: int = 4  # of each image
    paste: bool = True  # put kept pixels back as they were; false: every pixel as decoded from the codes
    own_size: bool = False  # files of each image's own size: what is drawn is scaled up into it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variants(self.variants)
        if self.own_size and not self.paste:
            raise UserError("got own_size=true with paste=false, expected either: what is drawn is put into the image")


def inpaint_files(config: InpaintConfig) -> str:
    """Writes the variants of each image (`write_variants`). Returns one line. Raises UserError."""
    check_mask(config.keep, config.images)
    drawing = open_drawing(config.model, config)
    pipeline = drawing.pipeline

    def draw(view: View, first_index: int) -> Iterable[Tensor]:
        assert view.keep is not None
        images, paste = view.image.expand(config.variants, -1, -1, -1), config.paste and view.whole is None
        settings = {"first_index": first_index, **drawing.settings}
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
