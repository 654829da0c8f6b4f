"""What tests of the loop read of runs, and how they compare two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def metrics(run: Path, split: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def newest_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


def assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit: weights of the best and of the last step, optimiser, counters and metrics."""
    names = ["metrics.jsonl", "model/model.safetensors", "model/config.json"]
    last = max((other / "checkpoints").iterdir()).name
    names += [f"checkpoints/{last}/{path.name}" for path in (other / "checkpoints" / last).iterdir()]
    differing = [name for name in names if (run / name).read_bytes() != (other / name).read_bytes()]
    assert differing == []
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in other.iterdir())


def assert_close_runs(run: Path, other: Path, tolerance: float) -> None:
    for split in ("train", "validation"):
        for line, expected in zip(metrics(run, split), metrics(other, split), strict=True):
            for name in {"loss", "grad_norm"} & expected.keys():
                assert line[name] == pytest.approx(expected[name], abs=tolerance)
    for name, expected in newest_weights(other).items():
        torch.testing.assert_close(newest_weights(run)[name], expected, rtol=0, atol=tolerance)
