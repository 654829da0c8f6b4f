"""Starting from the weights of another model, and parts of a model that do not learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import PretrainedModel
from common.wording import counted

NAMED = 4  # tensors by name in a message; of more there is a number


@dataclass(frozen=True)
class Taken:
    """What became of the tensors of a model that starts from another, by their names."""

    kept: tuple[str, ...]  # as they were
    resized: tuple[str, ...]  # made to fit: places of another grid, classes of other names
    new: tuple[str, ...]  # which nothing could be taken for
    left: tuple[str, ...]  # of the other model, which this one has no use for
    settings: tuple[str, ...]  # of this model that the other has otherwise: weights of equal shape may mean others

    def describe(self, source: str, other: PretrainedModel) -> str:
        """One line for a person."""
        said = [f"{counted(len(self.kept), 'tensor')} kept"]
        said += [
            f"{listed(names)} {what}"
            for names, what in ((self.resized, "resized"), (self.new, "new"), (self.left, "left behind"))
            if names
        ]
        said += [f"settings that differ: {', '.join(self.settings)}"] if self.settings else []
        return f"from {source}, {other!r}: {'; '.join(said)}"


def listed(names: Sequence[str]) -> str:
    if len(names) <= NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"


@torch.no_grad()
def take_weights(model: PretrainedModel, other: PretrainedModel) -> Taken:
    """Gives `model` the weights of `other`, a model of its kind: those of equal names that have its shapes, and those
    that it knows to fit to them (`PretrainedModel.fitted`). All else stays as it is. Raises UserError where there is
    nothing to take."""
    weights, theirs = model.state_dict(), other.state_dict()
    kept, resized, new = list[str](), list[str](), list[str]()
    for name, fresh in weights.items():
        found = model.fitted(name, theirs[name], fresh, other) if name in theirs else None
        if found is None:
            new.append(name)
            continue
        (kept if found is theirs[name] else resized).append(name)
        fresh.copy_(found)
    if not kept and not resized:
        raise UserError(
            f"nothing of {other!r} fits {model!r}: give this training the settings of that model, or leave it to start "
            "from nothing"
        )
    left = tuple(name for name in theirs if name not in weights)
    return Taken(tuple(kept), tuple(resized), tuple(new), left, differing_settings(model, other))


def differing_settings(model: PretrainedModel, other: PretrainedModel) -> tuple[str, ...]:
    """`model.width=64 (was 32)` for each setting of two models of a kind that is not the same. Of a model that begins
    with another kind, which is a part of it, those of this part."""
    path, config = "model", model.arguments().get("config")
    if model.kind != other.kind and isinstance(config, dict):
        parts = ((name, part) for name, part in config.items() if isinstance(part, dict))
        path, config = next(((f"model.{name}", part) for name, part in parts if part.get("kind") == other.kind))
    ours = dict(settings(path, config))
    theirs = dict(settings(path, other.arguments().get("config")))
    return tuple(f"{name}={ours[name]} (was {theirs.get(name)})" for name in ours if ours[name] != theirs.get(name))


def settings(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from settings(f"{path}.{name}", inner)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Parts of `model`, by the names of its modules, that do not learn: their weights need no gradient, and `train`
    leaves them in eval mode where `in_training` does it. Raises UserError for a part that there is not, and where
    nothing would learn."""
    for name in parts:
        children = [child for child, _ in model.named_children()]
        if not name or name not in dict(model.named_modules()):
            raise UserError(f"frozen={name}: the model has no such part, expected one of {', '.join(children)}")
        for module in model.get_submodule(name).requires_grad_(False).modules():
            module.stands_still = True  # type: ignore[assignment]
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"frozen={', '.join(parts)} is all of the model: leave a part that learns out of it")


def stands_still(module: nn.Module) -> bool:
    """Whether the module is a frozen part, or in one."""
    return getattr(module, "stands_still", False)


def in_training(model: nn.Module) -> nn.Module:
    """`model.train()`, but for its frozen parts."""
    model.train()
    for module in model.modules():
        if stands_still(module):
            module.training = False
    return model


def resized_table(table: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Vectors of the places of a grid, (h w) d, for another grid, by bicubic interpolation."""
    rows = table.float().T.reshape(1, -1, *before)
    found = nn.functional.interpolate(rows, after, mode="bicubic", align_corners=False)
    return found.flatten(2)[0].T.to(table.dtype)
