"""A model folder's config claims how large a network is; its weights, which are read first, say how large it can be."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

TIMES = 2  # as many numbers as the weights have may be built, for what is made and thrown away
MORE = 2**25  # and so many besides
PUBLISHED = threading.local()  # whether this thread builds a network `of_known_size`
LARGEST_BUFFER = 2**28  # of a buffer, which need not be saved: the mask of an attention over 16,384 places has as many


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, this thread builds the network that has these weights: ValueError is raised where it becomes larger by
    far, when a weight has its shape and before anything is written into it, which is when memory is taken."""
    known = TIMES * sum(tensor.numel() for tensor in weights.values())
    left, thread = known + MORE, threading.get_ident()

    def is_counted() -> bool:
        return threading.get_ident() == thread and not getattr(PUBLISHED, "inside", False)

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal left
        if isinstance(parameter, Tensor) and is_counted():
            left -= parameter.numel()
            check(left >= 0)

    def look(module: nn.Module, name: str, buffer: Any) -> None:
        if isinstance(buffer, Tensor) and is_counted():
            check(buffer.numel() <= known + LARGEST_BUFFER)

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(look)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def of_known_size() -> Iterator[None]:
    """Inside, a library builds a network that it knows by its name, however much of it is kept: it is not counted."""
    before, PUBLISHED.inside = getattr(PUBLISHED, "inside", False), True
    try:
        yield
    finally:
        PUBLISHED.inside = before


def check(is_small_enough: bool) -> None:
    if not is_small_enough:
        raise ValueError("its config describes a larger network than that whose weights it has")
