"""`zellige interpolate`: a walk from one image to another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import UserError
from common.owned_folder import SHEET_NAME
from common.processes import process_state
from images.files import BadImageError
from pipelines.editing import check_share, open_drawing, read_view
from pipelines.pictures import contact_sheet, save_png, to_pil
from pipelines.sampling_options import DrawingOptions
from pipelines.settings import check_apart, results_folder
from stage2_prior.sampling_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(DrawingOptions):
    """Walks from one image to another, code by code."""

    model: str  # assembled model, or a hub id
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
    drawing = open_drawing(config.model, config)
    try:
        first, second = (read_view(Path(name), drawing.spec).image for name in (config.first, config.second))
    except BadImageError as error:
        raise UserError(f"{config.first} or {config.second} cannot be read: {error}; name other images") from error
    walk = drawing.pipeline.interpolate(first, second, config.num, redrawn=config.redrawn, **drawing.settings)
    pictures = [to_pil(image) for image in walk.images]
    files = {"first": str(Path(config.first).resolve()), "second": str(Path(config.second).resolve())}
    settings = {**drawing.record, **files, "num": config.num, "redrawn": config.redrawn}
    with results_folder(out, "interpolate", settings, process_state(), defaults=asdict(SamplingConfig())):
        for step, picture in enumerate(pictures):
            save_png(picture, out / f"step_{step:02d}.png")
        save_png(contact_sheet([pictures]), out / SHEET_NAME)
    return f"{len(pictures)} images from {config.first} to {config.second} in {out}, in a row on {out / SHEET_NAME}"
