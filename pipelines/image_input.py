"""What a person hands to Python as images, files, PIL pictures, arrays or tensors, as float tensors in [-1, 1]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from images.datasets import to_float
from images.files import BadImageError, flatten, open_upright, scale_to_cover
from pipelines.image_folders import image_names, to_images

Picture = Tensor | Image.Image | str | os.PathLike[str]
"""One image: a tensor c H W, a PIL picture, or a file."""

Pictures = Tensor | Picture | Sequence[Picture]
"""A tensor b c H W, one image, or several."""

ROUNDING = 1e-3  # by which pixels may leave [-1, 1]


def load_images(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
) -> Tensor:
    """The images of a folder (those of its subfolders too, in the order of their names), of one file, or of several:
    b c H W, float32 in [-1, 1], upright, transparency laid over white.

    size: a side or (H, W), to which they are scaled and cropped in the middle; needed where the images have several
    sizes. channels: 1 or 3. Raises UserError for a file that cannot be read and for images of several sizes.
    """
    if channels not in (1, 3):
        raise UserError(f"channels={channels}, expected 1 (grey) or 3 (colour)")
    paths = [Path(path) for path in ([source] if isinstance(source, str | os.PathLike) else source)]
    files = [
        (path if path.is_dir() else path.parent) / name
        for path in map(Path.expanduser, paths)
        for name in image_names(path)
    ]
    if not files:
        raise UserError("got no images to load; name a folder of images, or image files")
    shape = (size, size) if isinstance(size, int) else size
    return stacked([read(file, channels, shape) for file in files])


def read(path: Path, channels: int, shape: tuple[int, int] | None = None) -> Tensor:
    """c H W of a file; shape: to which it is scaled and cropped. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no image file {path}; check the path")
    try:
        picture = open_upright(path, channels)
        return to_images(picture if shape is None else fit(picture, *shape))[0]
    except BadImageError as error:
        raise UserError(f"{path} cannot be read as an image: {error}; leave it out, or save it anew") from error


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The picture scaled to cover `height` x `width`, and the middle cut out."""
    if height < 1 or width < 1:
        raise UserError(f"size={height}x{width}, expected at least 1 pixel on each side")
    covering = scale_to_cover(picture, height, width)
    left, top = (covering.width - width) // 2, (covering.height - height) // 2
    return covering.crop((left, top, left + width, top + height))


def as_images(pictures: Pictures, channels: int) -> list[Tensor]:
    """Each image as c H W, float in [-1, 1]; a uint8 tensor counts from 0 to 255. Raises UserError for what is no image
    and for values that are not in [-1, 1]."""
    if isinstance(pictures, Tensor):
        if pictures.ndim not in (3, 4):
            raise UserError(
                f"got a tensor of shape {tuple(pictures.shape)}, expected images: b c H W, or c H W for one"
            )
        return list(checked(pictures if pictures.ndim == 4 else pictures[None], channels))
    if isinstance(pictures, Image.Image | str | os.PathLike):
        pictures = [pictures]
    if not isinstance(pictures, Sequence):
        raise UserError(
            f"got images of type {type(pictures).__name__}, expected a tensor b c H W, PIL pictures or paths; an array "
            "becomes a tensor by torch.from_numpy"
        )
    if not len(pictures):
        raise UserError("got no images, expected at least one")
    return [image for picture in pictures for image in one_of(picture, channels)]


def one_of(picture: Picture, channels: int) -> list[Tensor]:
    if isinstance(picture, str | os.PathLike):
        path = Path(picture).expanduser()
        if path.is_dir():
            return list(load_images(path, channels=channels))
        return [read(path, channels)]
    if isinstance(picture, Image.Image):
        try:
            return [to_images(flatten(picture, channels))[0]]
        except BadImageError as error:
            raise UserError(f"got a picture that is no image: {error}; hand over another") from error
    if isinstance(picture, Tensor) and picture.ndim == 3:
        return list(checked(picture[None], channels))
    if isinstance(picture, np.ndarray):
        raise UserError("got an array, expected a tensor c H W; torch.from_numpy(array) makes it one")
    what = f"shape {tuple(picture.shape)}" if isinstance(picture, Tensor) else f"type {type(picture).__name__}"
    raise UserError(f"got an image of {what}, expected a tensor c H W, a PIL picture or a path")


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Images of one size as b c H W. Raises UserError for several sizes."""
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if len(sizes) > 1:
        some = ", ".join(f"{height}x{width}" for height, width in sizes[:3])
        raise UserError(
            f"got images of {len(sizes)} sizes ({some}{' ...' if len(sizes) > 3 else ''}), expected one; give `size` "
            "to load_images, or hand them over one by one"
        )
    return torch.stack(list(images))


def checked(images: Tensor, channels: int) -> Tensor:
    """b c H W, float in [-1, 1], as it is, or of uint8. Raises UserError for other channels and values."""
    if images.shape[1] != channels:
        colours = {1: "1 channel (grey)", 3: "3 channels (colour)"}.get(channels, f"{channels} channels")
        raise UserError(f"got images of shape {'x'.join(map(str, images.shape[1:]))}, expected {colours} first: c H W")
    if images.dtype == torch.uint8:
        return to_float(images)
    if not images.is_floating_point():
        raise UserError(f"got images of {images.dtype}, expected floats in [-1, 1], or uint8 from 0 to 255")
    if not images.numel():
        return images
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):  # not a number is neither
        scale = "divide by 127.5 and subtract 1, or hand over uint8"
        advice = scale if high > 4 else "scale them, or cut them off by clamp(-1, 1)"
        raise UserError(f"got images with values from {low:.4g} to {high:.4g}, expected [-1, 1]; {advice}")
    return images
