"""A GPU that is not there: what waits for one or copies to it is seen on a machine without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITED = (DataDependentOutputException, DynamicOutputShapeException)  # what is raised where a program would wait


class OnTheDevice(TorchDispatchMode):
    """Refuses tensors of the CPU, which would have to be copied: a CUDA graph cannot hold them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
                raise AssertionError(f"{func} has a tensor on the {tensor.device}")
        return result


@contextmanager
def imaginary_gpu() -> Iterator[None]:
    """Tensors have a device and a shape, but no numbers: asking for one, as a program does that waits, is an error."""
    with FakeTensorMode(), torch.device("cuda"):
        yield
