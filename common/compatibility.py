"""What is private of torch and Accelerate and yet needed, in one place: a release that changes it is met here, and by
the tests of this module."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

P = ParamSpec("P")
Result = TypeVar("Result")


def never_compiled(function: Callable[P, Result]) -> Callable[P, Result]:
    """`function` as it is, also inside a compiled one: as `torch.compiler.disable`, which imports the compiler as soon
    as it decorates something, and what torch has for functions of its own, at the first call: a second or two that each
    command would wait for. Here a process that has no compiler yet calls the function itself."""
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> Result:
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return called


def forget_accelerator_settings() -> None:
    """Lets a process make another Accelerator, with another precision say: Accelerate refuses a second one that
    differs. The process group stays."""
    AcceleratorState._reset_state()
    GradientState._reset_state()


def set_timeout(timeout: timedelta) -> None:
    """How long a process waits for the others of its group, from now on."""
    from torch.distributed import distributed_c10d  # torch may be built without it

    public = getattr(distributed_c10d, "set_timeout", None)  # not in every supported release
    (public or distributed_c10d._set_pg_timeout)(timeout)


def end_workers(batches: Iterator[Any]) -> None:
    """Ends the worker processes of a DataLoader's iterator now, also while an exception that came from them keeps the
    iterator alive; any other iterator is left alone."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()


def follow_all(averages: Sequence[Tensor], weights: Sequence[Tensor], share: float) -> None:
    """average <- average + share * (weight - average), in place, for all of them in a few launches."""
    torch._foreach_lerp_(list(averages), list(weights), share)


def begin_shares(root: FSDPModule) -> None:
    """What FSDP2 does at the first forward pass of the outermost module that has shares: now, since a part of it that
    is called by itself before that would take itself for the outermost one."""
    root._get_fsdp_state()._lazy_init()


def is_torchscript(content: bytes) -> bool:
    """Whether torch.load would take a file for a TorchScript program, and run it. As torch decides, by the archive's
    own records: an archive can be made that another reader finds other names in."""
    file = io.BytesIO(content)
    if not torch.serialization._is_zipfile(file):
        return False
    return torch.serialization._is_torchscript_zip(torch._C.PyTorchFileReader(file))


def tensor_of_storage(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """A tensor, without gradient and hooks, over a storage that torch.load has read."""
    return torch._utils._rebuild_tensor(storage, offset, size, stride)
