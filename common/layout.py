"""How maps, b c h w, lie in memory: plane after plane, or place after place with all channels of a place together.

PyTorch calls the second `channels_last`. On a CPU it spares convolutions the reordering of what comes in and goes out,
and quantizers, which look at places, their copies; but the backward pass of a group norm takes up to ten times as long
there. On GPUs it is what convolutions in half precision want. A network keeps the layout of its input.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lies_place_after_place(x: Tensor) -> bool:
    """Of one channel, too, whose two layouts differ in nothing but strides: what comes of it goes by them."""
    return x.ndim == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)


def place_after_place(x: Tensor) -> Tensor:
    """x, b c h w, channels last; itself where it lies so."""
    if lies_place_after_place(x):
        return x
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def laid_as(like: Tensor | None, maps: Tensor) -> Tensor:
    """maps, b c h w, as `like` lies, and plane after plane without one."""
    return place_after_place(maps) if like is not None and lies_place_after_place(like) else maps.contiguous()


def laid_for_convolutions(like: Tensor | None, maps: Tensor) -> Tensor:
    """As `laid_as`, but on a CPU channels last: for networks of convolutions without group norms."""
    return place_after_place(maps) if maps.device.type == "cpu" else laid_as(like, maps)
