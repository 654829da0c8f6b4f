"""Reference inputs and outputs of published implementations, in the folder `shared/golden` beside the checkout.

Each file holds the weights of a small model under their original names, inputs, and the outputs that the original
gave. Tests that need one skip where it is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor

GOLDEN = (Path(__file__).parents[1] / ".." / "shared" / "golden").resolve()


class Golden(NamedTuple):
    config: dict[str, Any]  # the original's constructor arguments
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def golden(name: str) -> Golden:
    """The reference of this name, such as `dalle_encoder`."""
    with safe_open(golden_file(f"{name}.safetensors"), "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    return Golden(config, part("weights/"), part("in/"), part("out/"))


def real_shapes(name: str) -> dict[str, Any]:
    """Names and shapes of the weights of a published full-size model."""
    return json.loads(golden_file("real_shapes.json").read_text())[name]["keys"]


def golden_file(name: str) -> Path:
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path
