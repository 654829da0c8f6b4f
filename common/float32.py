"""Arithmetic in float32 proper, whatever autocast and the settings of the process would make of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

FULL = ("none", "ieee")  # what PyTorch calls float32 without short cuts


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
