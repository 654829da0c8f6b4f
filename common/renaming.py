"""Weights under the names of another project into a model of ours: each tensor finds its place, or all is refused; and
names in saved models that outlast where a tensor lies in the code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from common.foreign_weights import first_few

Weights = Mapping[str, Tensor]
OriginalName = Callable[[str], str | None]
"""From a name in our state dict to the one in the file; None for what the original does not have, such as counters."""


def load_renamed(model: nn.Module, weights: Weights, original_name: OriginalName, ignored: str = r"(?!)") -> None:
    """Gives `model` the tensors of `weights`, as float32 where they are floats; what `original_name` knows nothing of
    keeps its value. ignored: pattern for names in `weights` that the model has no use for.

    A linear layer's weight (c_out c_in) becomes that of a 1x1 convolution where the model has one. Raises UserError for
    names that are missing or left over, and for wrong shapes.
    """
    state = model.state_dict()
    names = {key: name for key in state if (name := original_name(key)) is not None}
    missing = [name for name in names.values() if name not in weights]
    left_over = sorted(weights.keys() - set(names.values()))
    left_over = [name for name in left_over if not re.match(ignored, name)]
    misshapen = [
        f"{name} is {times(weights[name])}, not {times(state[key])}"
        for key, name in names.items()
        if name in weights and not fits(weights[name], state[key])
    ]
    problems = [
        f"{what}: {first_few(items)}"
        for what, items in (("missing", missing), ("wrong shapes", misshapen), ("not expected", left_over))
        if items
    ]
    if problems:
        raise UserError(
            f"the weights are not those of this model ({'; '.join(problems)}); check --kind, and give the original's "
            "own constructor arguments as --config"
        )
    state.update({key: weights[name].reshape(state[key].shape).to(state[key].dtype) for key, name in names.items()})
    model.load_state_dict(state)


def fits(given: Tensor, wanted: Tensor) -> bool:
    linear_as_convolution = given.ndim == 2 and wanted.shape == (*given.shape, 1, 1)
    return given.shape == wanted.shape or linear_as_convolution


def times(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a single number"


def renamed(name: str, rules: Mapping[str, str | Callable[[re.Match[str]], str]]) -> str:
    """The name after each rule, pattern and replacement, in order."""
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


# ---- names of our own in saved models -------------------------------------------------------------------------------


def name_as_own(owner: nn.Module, child: str) -> None:
    """In state dicts, the tensors of `owner.child` go by names of the owner itself: in those of models that are saved
    since before there was the child."""
    owner.register_state_dict_post_hook(partial(name_without, child))
    owner.register_load_state_dict_pre_hook(partial(name_with, child))


def name_without(child: str, owner: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}{child}."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def name_with(child: str, owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in owner.get_submodule(child).state_dict():
        if prefix + name in state:
            state[f"{prefix}{child}.{name}"] = state.pop(prefix + name)
