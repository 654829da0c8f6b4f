"""How maps, b c h w, lie in memory: plane after plane, or place after place with all channels of a place together.

PyTorch calls the second `channels_last`. On a CPU it spares convolutions the reordering of what comes in and goes out,
and quantizers, which look at places, their copies; but group norms take up to ten times as long there, in the backward
pass. A network keeps the layout of its input.
"""

from __future__ import annotations

import torch
from torch import Tensor


def place_after_place(x: Tensor) -> Tensor:
    """x, b c h w, channels last; itself where it lies so. Of one channel, too, whose two layouts differ in nothing but
    strides: what comes of it goes by them."""
    if x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def on_cpu_place_after_place(x: Tensor) -> Tensor:
    """For networks of convolutions without group norms."""
    return place_after_place(x) if x.device.type == "cpu" else x
