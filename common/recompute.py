"""Activations that are computed again in the backward pass instead of being kept for it (Chen et al. 2016,
arXiv:1604.06174): the memory of one block at a time for one more forward pass.

What is recomputed are a model's blocks: the modules in a ModuleList or a Sequential that are made of modules
themselves, the outermost ones. A class says otherwise by its attribute `recompute`: "parts" for a module of which not
it but the blocks inside are meant, "never" for one that is left alone with all that is in it.

A block computes the same the second time, to the last bit: of dropout it draws the same. What it does besides, such as
noting statistics of the batch, it must do once: it asks `recomputing`. And what it has found out together with other
processes, or drawn for its samples (common/draws.py), it takes from memory, `once_agreed`: the recomputation is no time
to communicate, and it begins when others have drawn since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.compatibility import never_compiled


class _State:
    """What is computed now. A process computes one block at a time: a GPU's backward pass, which has a thread of its
    own, runs while the others wait for it."""

    agreed: deque[Tensor] | None = None  # inside a block: what it has found out or drawn, to be had again
    again: bool = False  # whether it is recomputed


_state = _State()


def recomputing() -> bool:
    """Whether what runs now has been computed before, and is computed again for the backward pass."""
    return _state.again


def once_agreed(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute`, which communicates or draws, returns; where a block is recomputed, what it returned the first
    time."""
    if _state.agreed is None:
        return compute()
    if _state.again:
        return _state.agreed.popleft()
    found = compute()
    _state.agreed.append(found)
    return found


class _Inside(AbstractContextManager[None]):
    """While a block is computed, or computed again. May be entered several times, one after the other: where a graph is
    kept, it is gone through more than once."""

    def __init__(self, agreed: deque[Tensor], *, again: bool) -> None:
        self.agreed, self.again = agreed, again

    def __enter__(self) -> None:
        self.before = _state.agreed, _state.again
        _state.agreed, _state.again = deque(self.agreed) if self.again else self.agreed, self.again

    def __exit__(self, *error: object) -> None:
        _state.agreed, _state.again = self.before


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The modules inside this one whose activations are recomputed."""
    found: list[nn.Module] = []
    for child in module.children():
        said = getattr(child, "recompute", None)
        if said == "never":
            continue
        repeated = isinstance(module, nn.ModuleList | nn.Sequential)
        made_of_modules = not isinstance(child, nn.ModuleList | nn.Sequential) and any(True for _ in child.children())
        callable_itself = type(child).forward is not nn.Module.forward
        if repeated and made_of_modules and callable_itself and said != "parts":
            found.append(child)
        else:
            found += blocks_of(child)
    return list(dict.fromkeys(found))


class Recomputation:
    """Of the blocks of a model: while it is `on`, they keep nothing but their inputs for the backward pass."""

    def __init__(self, blocks: Sequence[nn.Module], *, compiled: bool = False) -> None:
        """compiled: each block is compiled for itself, for a model that is compiled around them stops at each."""
        self.forwards = [
            (block, frugal(torch.compile(block.forward) if compiled else block.forward)) for block in blocks
        ]

    @contextmanager
    def on(self) -> Iterator[None]:
        for block, forward in self.forwards:
            block.forward = forward
        try:
            yield
        finally:
            for block, _ in self.forwards:
                del block.forward


def frugal(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, of whose activations only its inputs are kept for the backward pass."""

    @never_compiled
    def recomputed(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        agreed: deque[Tensor] = deque()
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (_Inside(agreed, again=False), _Inside(agreed, again=True)),
            **options,
        )

    return recomputed
