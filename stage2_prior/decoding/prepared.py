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
    each `kind`. What it makes is never written to. Changes are noticed by PyTorch's counter of writes and by where the
    weights lie, so one that goes around both, by `weight.data.mul_(2)`, is not.

    While a CUDA graph is recorded nothing is kept: each replay makes it of the weights as they are by then."""
    weights = list(model.parameters())
    with torch.autocast(weights[0].device.type, enabled=False):
        recorded = weights[0].is_cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if recorded or any(weight.is_inference() for weight in weights):  # which have no counter
            return make()
        state = [state_of(weight) for weight in weights]
        kept = KEPT.get(model)
        if kept is None or kept.state != state:
            kept = KEPT[model] = Kept(state, {})
        if kind not in kept.made:
            kept.made[kind] = make()
        return kept.made[kind]


def state_of(weight: Tensor) -> object:
    """Equal for equal states of a weight. It holds no memory, and its place in memory is not mistaken for that of
    another weight that is put there later."""
    place = StorageWeakRef(weight.untyped_storage()), weight.storage_offset()
    return place, weight._version, weight.dtype, weight.shape, weight.stride()
