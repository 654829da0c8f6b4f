"""Reference inputs and outputs of published implementations, in `shared/golden`, of likelihood VAEs in
`shared/golden_vae`, and of the systems of 2024 to 2026 in `shared/golden_frontier`, folders beside the checkout.

Each file holds the weights of a small model under their original names, inputs, and the outputs that the original
gave. Tests that need one skip where it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = (Path(__file__).parents[1] / ".." / "shared" / "golden").resolve()
GOLDEN_VAE = GOLDEN.with_name("golden_vae")
GOLDEN_FRONTIER = GOLDEN.with_name("golden_frontier")

T = TypeVar("T")


class Golden(NamedTuple):
    config: dict[str, Any]  # the original's constructor arguments
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class GoldenVAE(NamedTuple):
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    atol: float  # beside a relative 1e-5
    exceptions: dict[str, float]  # of outputs that are ill-conditioned in float32

    def variant(self, name: str) -> GoldenVAE:
        """One variant of a file that holds several."""
        return GoldenVAE(
            self.config[name],
            part(self.weights, f"{name}."),
            part(self.inputs, f"{name}."),
            part(self.outputs, f"{name}/"),
            self.atol,
            part(self.exceptions, f"{name}/"),
        )

    def check(self, output: str, value: Tensor) -> None:
        """That the value is what the original gave, as near as the file says it must come."""
        expected, atol = self.outputs[output], self.exceptions.get(output, self.atol)
        torch.testing.assert_close(value.to(expected.dtype), expected, rtol=1e-5, atol=atol)


def golden(name: str) -> Golden:
    """The reference of this name, such as `dalle_encoder`."""
    facts, *parts = read(golden_file(f"{name}.safetensors"))
    return Golden(json.loads(facts["config"]), *parts)


def golden_frontier(name: str) -> Golden:
    """The reference of this name, such as `halton_order`."""
    facts, *parts = read(golden_file(f"{name}.safetensors", GOLDEN_FRONTIER))
    return Golden(json.loads(facts["config"]), *parts)


def golden_vae(name: str) -> GoldenVAE:
    """The reference of this name, such as `pythae_vae`."""
    facts, *parts = read(golden_file(f"{name}.safetensors", GOLDEN_VAE))
    return GoldenVAE(json.loads(facts["config"]), *parts, float(facts["atol"]), json.loads(facts["atol_exceptions"]))


def read(path: Path) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Metadata, weights, inputs and outputs."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return file.metadata(), part(tensors, "weights/"), part(tensors, "in/"), part(tensors, "out/")


def part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}


def real_shapes(name: str) -> dict[str, Any]:
    """Names and shapes of the weights of a published full-size model."""
    return json.loads(golden_file("real_shapes.json").read_text())[name]["keys"]


def real_shapes_vae(name: str) -> dict[str, Any]:
    """Likewise, of a likelihood VAE."""
    return json.loads(golden_file("real_shapes.json", GOLDEN_VAE).read_text())[name]


def real_shapes_frontier(name: str) -> dict[str, Any]:
    """Likewise, of a system of 2024 to 2026."""
    return json.loads(golden_file("real_shapes.json", GOLDEN_FRONTIER).read_text())[name]


def golden_file(name: str, folder: Path = GOLDEN) -> Path:
    path = folder / name
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path


def of_theirs(images: Tensor) -> Tensor:
    """Their pixels, from 0 to 1, as ours."""
    return 2 * images - 1


def without_values(name: str) -> dict[str, Tensor]:
    """Tensors of the names and shapes of published weights."""
    shapes = real_shapes_frontier(name)
    return {key: torch.empty([side for side in shape if isinstance(side, int)]) for key, shape in shapes.items()}
