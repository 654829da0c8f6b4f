"""Images with missing pixels, completed by a VAE that was trained on such images: `zellige inpaint` of a VAE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import sha256_of_file
from pipelines.devices import open_device
from pipelines.editing import Frame, View, check_mask, read_kept_view, read_view
from pipelines.generation.results import Output
from pipelines.latents.models import load_vae
from pipelines.masks import PARTS, fitted_mask, white
from pipelines.variants import each_alone, write_variants
from stage1_vae.completing import check_knows_holes, complete
from stage1_vae.holes import mask_of_file, open_mask

MASKS = "masks"  # as `keep`: each image's own mask beside it, white where pixels are missing


def complete_files(
    model: str,
    images: str,
    output: Output,
    *,
    keep: str,
    variants: int,
    expected: bool,
    draws: int,
    seed: int,
    device: str | None,
) -> str:
    """Writes the variants of each image (`write_variants`), or its expected completion alone. Returns one line. Raises
    UserError. The arguments are the fields of `InpaintConfig`."""
    _, place = open_device(device)
    if keep != MASKS:
        check_mask(keep, images)
    vae = check_knows_holes(load_vae(model, device=place))
    frame = Frame(*vae.image_size, vae.config.channels)
    read: Callable[[Path], View] = partial(read_masked_view, frame=frame)
    if keep != MASKS:
        read = partial(read_kept_view, spec=frame, keep=keep, own_size=False)

    def draw(view: View, number: int) -> Iterable[Tensor]:
        assert view.keep is not None
        image = view.image.where(view.keep, math.nan)[None].to(place)
        made = complete(vae, image, draws=draws, drawn=0 if expected else variants, seed=seed, first=number)
        return made.expected.cpu() if expected else made.drawn[:, 0].cpu()

    settings = {
        "model": vae.fingerprint(),
        "keep": keep,
        "mask": None if keep in (*PARTS, MASKS) else sha256_of_file(Path(keep)),
        "expected": expected,
        "draws": draws,
        "seed": seed,
    }
    count = 1 if expected else variants
    beside = (lambda path: [mask_of_file(path)]) if keep == MASKS else (lambda path: [])
    return write_variants("inpaint", images, output, count, settings, read, each_alone(draw, count), beside=beside)


def read_masked_view(path: Path, frame: Frame) -> View:
    """An image scaled and cropped to the model's size, of which its own mask says what is missing. Raises BadImageError
    and, for an image without a mask, or with one that cannot be read, has another size or leaves nothing, UserError."""
    view, mask, opened = read_view(path, frame), mask_of_file(path), open_mask(path)
    if opened is None:
        raise UserError(
            f"{path} has no mask {mask.name} beside it, expected one, white where pixels are missing; or give --keep"
        )
    keep = fitted_mask(~white(opened), frame.image_height, frame.image_width)
    if not bool(torch.any(keep)):
        raise UserError(f"{mask} says that all of {path.name} is missing, expected some black: nothing is seen of it")
    return View(view.image, keep)
