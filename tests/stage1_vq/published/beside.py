"""What tests of quantizers beside published code share: a variant's tensors, and how they are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from tests.golden import Golden, part

ATOL = 1e-5
FLOOR = 1e-5  # their logarithms in entropies are of at least this


def close(ours: Tensor | None, theirs: Tensor, atol: float = ATOL) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


def variant_of(
    whole: Golden, variant: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Arguments, weights, inputs and outputs of one of a file's variants."""
    weights, inputs = part(whole.weights, f"{variant}."), part(whole.inputs, f"{variant}.")
    return whole.config[variant], weights, inputs, part(whole.outputs, f"{variant}/")


def as_latents(vectors: Tensor) -> Tensor:
    """b n d to b d n 1, where it is not b d h w already."""
    return vectors if vectors.ndim == 4 else rearrange(vectors, "b n d -> b d n 1")


def as_codes(indices: Tensor) -> Tensor:
    return indices if indices.ndim == 3 else rearrange(indices, "b n -> b n 1")


def side_by_side(codes: tuple[Tensor, ...]) -> Tensor:
    """Grids b n 1 as indices b n g."""
    return torch.stack([grid.squeeze(-1) for grid in codes], -1)


def load_projections(quantizer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Linear layers to 1x1 convolutions."""
    with torch.no_grad():
        for name, weight in quantizer.named_parameters():
            if name.startswith("project"):
                weight.copy_(weights[name].view(weight.shape))


def check_projection_gradients(quantizer: nn.Module, outputs: dict[str, Tensor], atol: float) -> None:
    for name, weight in quantizer.named_parameters():
        if name.startswith("project"):
            close(weight.grad, outputs[f"grad/{name}"].view(weight.shape), atol)


def rows_as_latents(rows: Tensor) -> Tensor:
    """n d to 1 d n 1."""
    return rearrange(rows, "n d -> 1 d n 1")


def draws_from(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, recorded: list[Tensor]) -> None:
    """What the module draws by this name are the recorded numbers, in their order."""
    waiting: Iterator[Tensor] = iter(recorded)
    monkeypatch.setattr(module, name, lambda *shape, **_: next(waiting))


def floored_entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=FLOOR).log()).sum(-1)
