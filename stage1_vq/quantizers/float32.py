"""Arithmetic that decides codes is in float32 proper: in bfloat16 or TF32, with 8 or 11 bits, near codes are one.

Three things make less of it: autocast; TF32 in cuDNN's convolutions, which PyTorch allows by default; and what a user
allows besides, such as `torch.set_float32_matmul_precision("high")`. The first and the last are switched off inside
`float32_island`, and `ProductConv2d` is a convolution that does without cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from common.compatibility import never_compiled

FULL = ("none", "ieee")  # what PyTorch calls float32 without short cuts
EXACT_CONVOLUTIONS = ("cpu",)  # devices whose convolutions have full precision inside `full_precision`


def float32_island(device_type: str) -> AbstractContextManager[Any]:
    """In it neither autocast nor a precision that the user has set makes less of float32.

    Compiled code takes the precision of its products from the process as it is; what decides codes is not compiled.
    Products of the backward pass go by the user's precision: a gradient decides no code.
    """
    without_autocast = torch.autocast(device_type, enabled=False)
    return without_autocast if torch.compiler.is_compiling() else inside_both(without_autocast)


@contextmanager
def inside_both(without_autocast: AbstractContextManager[Any]) -> Iterator[None]:
    with without_autocast, full_precision():
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products on all devices, and convolutions on the CPU, are in float32 proper, whatever the user has set."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul, mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    if all(precision in FULL for precision in before):
        yield
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set the newer settings alone, and PyTorch will not name an older one for them
        older = "highest"
    torch.set_float32_matmul_precision("highest")
    mkldnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


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
