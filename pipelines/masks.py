"""Which pixels of an image stay: named parts, mask files, and putting those pixels back where others were drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.errors import UserError
from images.files import BadImageError, flatten, open_upright

PARTS = ("left", "right", "top", "bottom", "middle")

Mask = Tensor | Image.Image | str | os.PathLike[str]
"""A tensor `H W` or `b H W`, bool, True where a pixel stays; or a picture or a file that is white there."""


def rectangle(height: int, width: int, part: str) -> Tensor:
    """`H W` bool, True in the named part of an image: left, right, top or bottom half, or the middle (half of each
    side)."""
    keep = torch.zeros(height, width, dtype=torch.bool)
    rows, columns = {
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "top": (slice(0, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "middle": (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)),
    }[part]
    keep[rows, columns] = True
    return keep


def read_mask(path: Path) -> Tensor:
    """`H W` bool at the size of the file, True where it is white rather than black. Raises UserError."""
    if not path.is_file():
        raise UserError(f"keep={path} is neither a file nor one of {', '.join(PARTS)}; name a part, or a mask")
    try:
        return white(open_upright(path, 1))
    except BadImageError as error:
        raise UserError(f"the mask {path} cannot be read: {error}; save it as PNG, white where pixels stay") from error


def white(picture: Image.Image) -> Tensor:
    """`H W` bool"""
    return torch.from_numpy(np.array(flatten(picture, 1))) > 127


def mask_of(keep: Mask, batch: int, height: int, width: int) -> Tensor:
    """`b H W` bool, of a mask of exactly that size, or of one of each image. Raises UserError for another size or type,
    and for one that keeps nothing or everything."""
    if isinstance(keep, Image.Image):
        try:
            keep = white(keep)
        except BadImageError as error:
            raise UserError(f"the mask is no image: {error}; hand over one of black and white") from error
    elif not isinstance(keep, Tensor):
        keep = read_mask(Path(keep).expanduser())
    if keep.dtype != torch.bool or keep.shape not in ((height, width), (batch, height, width)):
        raise UserError(
            f"got a mask of {keep.dtype} and shape {tuple(keep.shape)}, expected torch.bool of {height}x{width}, the "
            f"size of the images, or of {batch}x{height}x{width}: True for a pixel that stays"
        )
    check_keeps_some(keep, "the mask")
    return keep.expand(batch, -1, -1)


def check_keeps_some(keep: Tensor, name: str) -> None:
    """Raises UserError for a mask, or one of several, `... H W` bool, that keeps no pixel or all of them."""
    if not bool(keep.flatten(-2).any(-1).all()):
        raise UserError(
            f"{name} keeps nothing: it is black all over, expected white where pixels stay; generate draws whole images"
        )
    if bool(keep.flatten(-2).all(-1).any()):
        raise UserError(f"{name} keeps everything: nothing is left to draw, expected black where new pixels come")


def check_proportions(mask: Tensor, height: int, width: int, name: str, image: str) -> None:
    """Raises UserError unless a mask, H W, is as an image of `height` x `width` scaled to its size would be, up to the
    rounding of a side."""
    h, w = mask.shape
    if abs(h * width - w * height) > max(height, width):
        raise UserError(
            f"{name} has {w}x{h} pixels and {image} {width}x{height}, expected the same size or proportions; paint it "
            "over the image itself"
        )


def scaled_mask(keep: Tensor, height: int, width: int) -> Tensor:
    """A mask `H W` at another size, `height` x `width`: kept where all that a pixel covers is."""
    return F.adaptive_max_pool2d((~keep)[None].float(), (height, width))[0] == 0


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """`... H W` -> `... height width`"""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


def fitted_mask(keep: Tensor, height: int, width: int) -> Tensor:
    """A mask `H W` as `image_input.fit` scales and crops its image."""
    scale = max(height / keep.shape[0], width / keep.shape[1])
    covering = scaled_mask(keep, max(height, round(keep.shape[0] * scale)), max(width, round(keep.shape[1] * scale)))
    top, left = (covering.shape[0] - height) // 2, (covering.shape[1] - width) // 2
    return Box(top, left, height, width).of(covering)


def window_around(keep: Tensor, height: int, width: int, name: str) -> Box:
    """The largest part of an image that has the proportions of `height` x `width`, as far around the middle of what is
    not kept (`H W` bool) as it goes. Raises UserError where some of that would lie outside."""
    rows, columns = ((~keep).any(dim).nonzero()[:, 0] for dim in (1, 0))
    scale = min(keep.shape[0] / height, keep.shape[1] / width)
    sides = [max(1, round(height * scale)), max(1, round(width * scale))]
    starts = []
    for places, side, whole in zip((rows, columns), sides, keep.shape, strict=True):
        first, last = int(places[0]), int(places[-1])
        starts.append(min(max((first + last + 1 - side) // 2, 0), whole - side))
        if last - first >= side:
            spans = f"{int(columns[-1] - columns[0]) + 1}x{int(rows[-1] - rows[0]) + 1}"
            raise UserError(
                f"what is to be drawn of {name} spans {spans} pixels, expected at most {sides[1]}x{sides[0]}, the "
                f"proportions of this model's images; leave own_size out, or cut {name} to these proportions"
            )
    return Box(starts[0], starts[1], sides[0], sides[1])


def pasted(drawn: Tensor, originals: Tensor, keep: Tensor, reach: int) -> Tensor:
    """`originals` where `keep` (b H W bool), exactly, and `drawn` elsewhere, b c H W both.

    So that no seam shows, the mean difference of both in the kept part near by is added to what is drawn, all of it at
    the border and nothing from `reach` pixels on. Nothing else of the originals goes in: what stood in the place of
    what is drawn may be what should go.
    """
    kept = keep[:, None].to(drawn.dtype)
    near = mean_around((originals - drawn).masked_fill(~keep[:, None], 0.0), reach)
    share = mean_around(kept, reach)  # a half at a straight border
    return torch.where(keep[:, None], originals, (drawn + near / share.clamp(min=0.5)).clamp(-1, 1))


def mean_around(x: Tensor, reach: int) -> Tensor:
    """Of x, b c H W, over a square of up to `reach` pixels to each side; beyond the borders nothing is counted."""
    for kernel, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        x = F.avg_pool2d(x, kernel, stride=1, padding=padding, count_include_pad=False)
    return x
