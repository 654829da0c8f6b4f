"""What is made of a model's weights for sampling, kept beside the model until a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Made = TypeVar("Made")


class Kept(NamedTuple):
    state: list[object]  # of the weights that `made` was made of
    made: dict[Hashable, Any]


KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()  # beside the models: no state dict or copy has it


@torch.inference_mode()
def prepared(model: nn.Module, kind: Hashable, make: Callable[[], Made]) -> Made:
    """`make()`, which reads nothing but the weights of `model`, or what it made earlier of the same weights, once for
    each `kind`. What it makes is never written to.

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
        if kind not in kept.made:
            kept.made[kind] = make()
        return kept.made[kind]


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
