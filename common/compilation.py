"""What `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Result = TypeVar("Result")


def never_compiled(function: Callable[P, Result]) -> Callable[P, Result]:
    """`function` as it is, also inside a compiled one: as `torch.compiler.disable`, which imports the compiler as soon
    as it decorates something, a second or more that each command would wait for. What torch has for functions of its
    own, under a private name, imports it at the first call."""
    return torch._disable_dynamo(function)
