"""`zellige vary`: images of which the prior draws a share of the codes anew, or groups of a hierarchy's latents."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

from torch import Tensor

from common.errors import UserError
from pipelines.editing import View, check_share, check_variants, open_drawing, read_view, write_variants
from pipelines.latents.models import is_vae
from pipelines.latents.varying import Redrawing, vary_latents
from pipelines.model_folders import any_model_folder
from pipelines.sampling_options import DrawingOptions, check_temperatures, chosen_precision


@dataclass(frozen=True, kw_only=True)
class VaryConfig(DrawingOptions):
    """Draws a share of the codes of images anew, or groups of their latents, in several variants."""

    model: str  # assembled model, VAE with a hierarchy of latents, or a hub id
    images: str  # folder of images, or one image file; scaled and cropped to the size that the model makes
    out: str  # folder for NAME_VARIANT.png and sheet.png
    share: float = 0.3  # of the codes, or of a hierarchy's groups, from the lowest one up, that is drawn anew
    groups: tuple[int, ...] | None = None  # of a hierarchy, which are drawn anew, 0 the top one; left out: by the share
    temperatures: tuple[float, ...] | None = None  # of a hierarchy of latents, one a group, the top one first
    variants: int = 4  # of each image

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variants(self.variants)
        check_share("share", self.share)
        check_temperatures(self.temperature, self.temperatures)


def vary_files(config: VaryConfig) -> str:
    """Writes the variants of each image (`write_variants`). Returns one line. Raises UserError."""
    if is_vae(config.model):
        asked = redrawing_of(config)
        return vary_latents(config.model, config.images, config.out, config.variants, asked, config.device)
    any_model_folder(config.model)  # where there is none, nothing is said of its codes
    for name, value in (("groups", config.groups), ("temperatures", config.temperatures)):
        if value is not None:
            raise UserError(f"{name}={value}, expected none: {config.model} has codes, and no groups of latents")
    drawing = open_drawing(config.model, config, config.out)

    def draw(view: View, number: int) -> Tensor:
        images, first_index = view.image.expand(config.variants, -1, -1, -1), number * config.variants
        return drawing.pipeline.vary(images, config.share, first_index=first_index, **drawing.settings).images

    record = {**drawing.record, "share": config.share}
    read = partial(read_view, spec=drawing.spec)
    return write_variants("vary", config.images, config.out, config.variants, record, read, draw)


def redrawing_of(config: VaryConfig) -> Redrawing:
    """Raises UserError for what priors over codes are asked, and a hierarchy of latents is not."""
    asked = {"model", "images", "out", "share", "groups", "variants", "temperature", "temperatures", "seed", "device"}
    asked |= {"precision"}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in asked and value != field.default:
            raise UserError(
                f"{field.name}={value}, expected it left out: {config.model} is a VAE, which draws without it"
            )
    temperature = 1.0 if config.temperature is None else config.temperature
    return Redrawing(
        config.share, config.groups, config.temperatures or temperature, config.seed, chosen_precision(config.precision)
    )
