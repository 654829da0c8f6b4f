"""What is made of a model's weights for sampling, kept beside the model until a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Made = TypeVar("Made")


class Kept(NamedTuple):
    state: list[object]  # of the weights that `made` was made of
    made: dict[Hashable, tuple[bool, Any]]  # of each kind, whether for a single row


KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()  # beside the models: no state dict or copy has it


SINGLE: ContextVar[bool] = ContextVar("SINGLE", default=False)


def for_a_single_row() -> bool:
    """Whether matrices that are laid out now will be multiplied with one row at a time."""
    return SINGLE.get()


@torch.inference_mode()
def prepared(model: nn.Module, kind: Hashable, make: Callable[[], Made], rows: int | None = None) -> Made:
    """`make()`, which reads nothing but the weights of `model`, or what it made earlier of the same weights, once for
    each `kind`. What it makes is never written to. rows: of a step, where matrices lie otherwise for one than for more
    (`for_a_single_row`); what was made last for either is kept.

    On a GPU it is made each time, at the cost of a few of its kernels: whether a weight has changed could only be known
    by waiting for the device, and a recorded graph is to follow weights that change between its replays."""
    weights = list(model.parameters())
    with torch.autocast(weights[0].device.type, enabled=False):
        if any(weight.device.type != "cpu" for weight in weights):
            return make()
        state = [state_of(weight) for weight in weights]
        kept = KEPT.get(model)
        if kept is None or kept.state != state:
            kept = KEPT[model] = Kept(state, {})
        single = rows == 1
        if kind not in kept.made or kept.made[kind][0] != single:
            kept.made.pop(kind, None)  # its memory is free before it is needed again
            token = SINGLE.set(single)
            try:
                kept.made[kind] = single, make()
            finally:
                SINGLE.reset(token)
        return kept.made[kind][1]


def state_of(weight: Tensor) -> object:
    """Equal for equal states of a weight: where it lies, without holding that memory, and the sum of its bits, which
    takes as long as reading it once. PyTorch's counter of writes alone would not do: fused optimisers do not count."""
    place = StorageWeakRef(weight.untyped_storage()), weight.storage_offset()
    counter = None if weight.is_inference() else weight._version
    return place, counter, weight.dtype, weight.shape, weight.stride(), sum_of_bits(weight)


def sum_of_bits(weight: Tensor) -> int:
    """Modulo 2**64, of a weight of any type and size."""
    rows = weight.detach().contiguous().view(-1)
    for integer in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if rows.nbytes % integer.itemsize == 0 and rows.data_ptr() % integer.itemsize == 0:
            return int(rows.view(integer).sum())
    raise AssertionError("bytes divide by one")
