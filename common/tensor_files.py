"""Tensors in safetensors files, with the errors and permissions that every other file has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes named tensors of any device and layout. Raises OSError as any other write would: call it inside
    `atomic_file` or `atomic_folder`, which turn a full disk into a UserError."""
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file(_apart(tensors), path)
    except SafetensorError as error:
        # safetensors hides the operating system's error in its text: "... No space left on device (os error
        # 28)".
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(permissions)  # safetensors leaves files that only their owner can read, whatever the umask says


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. Raises SafetensorError when it is damaged, OSError when it cannot be read."""
    return load_file(path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory: the format refuses tied weights, so each is written
    whole."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart
