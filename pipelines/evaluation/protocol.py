"""How figures came about: what a number needs beside it to be repeated, and to be compared with another."""

from __future__ import annotations

import platform
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import PartialState

from images.datasets import ImageDataset
from images.sources import ArraySource
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.gathering import Values
from pipelines.evaluation.images import CROP, FILTER, evenly, hash_of_set

LIBRARIES = ("zellige", "torch", "torchvision", "timm", "numpy", "pillow")
ROUNDING = "8 bits: clamped to [-1, 1], then (x + 1) * 127.5 to the nearest whole number"
# Of the options: where results go, and where they are computed.
NOT_REPEATED = ("out", "against", "pictures", "device", "reference_cache")
LOOKED_AT = 64  # files whose own size is read


def beginning(config: EvaluateConfig, state: PartialState) -> dict[str, Any]:
    """What all evaluations record."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "asked": asked(config),
        "versions": versions(),
        "machine": {
            "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type,
            "processor": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rounding": ROUNDING,
    }


def asked(config: Any) -> dict[str, Any]:
    """The options that are not their defaults, nested as the config is: enough to ask again."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found |= {field.name: inner} if (inner := asked(value)) else {}
        elif value != field.default and field.name not in NOT_REPEATED:
            found[field.name] = value
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def of_images(images: ImageDataset, split: str, values: Values, chosen: int) -> dict[str, Any]:
    """Of a set of images that was judged; chosen: how many were to be."""
    count = len(values["sha256"])
    return {
        "path": images.config.path,
        "split": split if isinstance(images.source, ArraySource) else None,
        "images": count,
        "unreadable": chosen - count,
        "of": len(images),
        "sha256": hash_of_set(values),
        "size": [images.config.height, images.config.width],
        "channels": images.config.channels,
        "own_size": own_size(images),
        "crop": CROP,
        "filter": FILTER,
    }


def own_size(images: ImageDataset) -> str:
    """Of the images before they are scaled: `32x32`, or the smallest and largest sides of some of them."""
    sizes = images.source.sizes([int(images.indices[i]) for i in evenly(LOOKED_AT, len(images))])
    sizes = sizes[sizes.min(axis=1) > 0]  # what cannot be read has none
    if not len(sizes):
        return "not known"
    low, high = sizes.min(axis=0), sizes.max(axis=0)
    smallest, largest = (f"{height}x{width}" for height, width in (low.tolist(), high.tolist()))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def lines_of(protocol: dict[str, Any]) -> list[str]:
    """For a person: a line on each part."""
    found = []
    for name, value in protocol.items():
        if name == "asked":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key.replace('_', ' ')} {shown(one)}" for key, one in value.items() if one is not None)
        found.append(f"  {name.replace('_', ' '):<16}{shown(value)}")
    return found


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return ("x" if all(isinstance(one, int) for one in value) else " ").join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if value >= 10_000 else str(value)
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text  # a fingerprint
