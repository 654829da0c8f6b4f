"""`zellige vary`: images of which the prior draws a share of the codes anew."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pipelines.editing import View, check_share, check_variants, open_drawing, read_view, write_variants
from pipelines.sampling_options import DrawingOptions


@dataclass(frozen=True, kw_only=True)
class VaryConfig(DrawingOptions):
    """Draws a share of the codes of images anew, in several variants."""

    model: str  # assembled model, or a hub id
    images: str  # folder of images, or one image file; scaled and cropped to the size that the model makes
    out: str  # folder for NAME_VARIANT.png and sheet.png
    share: float = 0.3  # of the codes that is drawn anew
    variants: int = 4  # of each image

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variants(self.variants)
        check_share("share", self.share)


def vary_files(config: VaryConfig) -> str:
    """Writes the variants of each image (`write_variants`). Returns one line. Raises UserError."""
    drawing = open_drawing(config.model, config)

    def draw(view: View, first_index: int) -> Tensor:
        images = view.image.expand(config.variants, -1, -1, -1)
        return drawing.pipeline.vary(images, config.share, first_index=first_index, **drawing.settings).images

    record = {**drawing.record, "share": config.share}
    read = partial(read_view, spec=drawing.spec)
    return write_variants("vary", config.images, config.out, config.variants, record, read, draw)
