"""`zellige vary`: images of which the prior draws a share of the codes anew, or groups of a hierarchy's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from common.errors import UserError
from pipelines.editing import View, check_share, open_drawing, read_view
from pipelines.generation.results import Output, check_place, recorded_of
from pipelines.generation.store import open_store
from pipelines.latents.models import is_vae
from pipelines.latents.varying import Redrawing, vary_latents
from pipelines.model_folders import any_model_folder
from pipelines.sampling_options import check_temperatures, chosen_precision
from pipelines.variants import RESULTS, VariantsOptions, in_batches, write_variants


@dataclass(frozen=True, kw_only=True)
class VaryConfig(VariantsOptions):
    """Draws a share of the codes of images anew, or groups of their latents, in several variants."""

    model: str  # assembled model, VAE with a hierarchy of latents, or a hub id
    share: float = 0.3  # of the codes, or of a hierarchy's groups, from the lowest one up, that is drawn anew
    groups: tuple[int, ...] | None = None  # of a hierarchy, which are drawn anew, 0 the top one; left out: by the share
    temperatures: tuple[float, ...] | None = None  # of a hierarchy of latents, one a group, the top one first

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("share", self.share)
        check_temperatures(self.temperature, self.temperatures)


def vary_files(config: VaryConfig) -> str:
    """Writes the variants of each image (`write_variants`). Returns one line. Raises UserError."""
    check_place(config.out)
    if is_vae(config.model):
        asked = redrawing_of(config)
        return vary_latents(config.model, config.images, config.output, config.variants, asked, config.device)
    any_model_folder(config.model)  # where there is none, nothing is said of its codes
    for name, value in (("groups", config.groups), ("temperatures", config.temperatures)):
        if value is not None:
            raise UserError(f"{name}={value}, expected none: {config.model} has codes, and no groups of latents")
    drawing = open_drawing(config.model, config, recorded_of(open_store(config.out), RESULTS))

    def draw(views: Sequence[View], batch: range) -> Tensor:
        images = torch.stack([view.image for view in views])
        return drawing.pipeline.vary(images, config.share, first_index=batch.start, **drawing.settings).images

    return write_variants(
        "vary",
        config.images,
        config.output,
        config.variants,
        {**drawing.record, "share": config.share},
        partial(read_view, spec=drawing.spec),
        in_batches(draw, config.variants),
        label=drawing.label,
    )


def redrawing_of(config: VaryConfig) -> Redrawing:
    """Raises UserError for what priors over codes are asked, and a hierarchy of latents is not."""
    asked = {"model", "images", "out", "share", "groups", "variants", "temperature", "temperatures", "seed", "device"}
    asked |= {"precision", *(field.name for field in fields(Output))}
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
