"""Arithmetic that decides codes is in float32 proper: in bfloat16 or TF32, with 8 or 11 bits, near codes are one.

Three things make less of it: autocast; TF32 in cuDNN's convolutions, which PyTorch allows by default; and what a user
allows besides, such as `torch.set_float32_matmul_precision("high")`. The first and the last are switched off inside
`common.float32.float32_island`, and `ProductConv2d` is a convolution that does without cuDNN.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from common.compatibility import never_compiled
from common.float32 import full_precision

EXACT_CONVOLUTIONS = ("cpu",)  # devices whose convolutions have full precision inside `full_precision`


class ProductConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps height and width, `b i h w` to `b o h w`, in float32: on devices whose own
    convolutions may be less, a matrix product. (On a CPU that takes up to six times as long.)"""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)

    @never_compiled  # compiled, it would take the precision that the user has set
    def forward(self, x: Tensor) -> Tensor:
        with full_precision():
            if x.device.type in EXACT_CONVOLUTIONS:
                return super().forward(x)
            kernel, padding = self.kernel_size[0], self.kernel_size[0] // 2
            columns = x.flatten(2) if kernel == 1 else F.unfold(x, kernel, padding=padding)
            y = einsum(self.weight.flatten(1), columns, "o i, b i n -> b o n")
            if self.bias is not None:
                y = y + self.bias.view(-1, 1)
            return y.unflatten(2, x.shape[2:])


@never_compiled
def turned(vectors: Tensor, rotation: Tensor) -> Tensor:
    """b i h w times a matrix, i o: b o h w."""
    with full_precision():
        return einsum(vectors, rotation, "b i h w, i o -> b o h w")
