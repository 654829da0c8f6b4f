"""Shares of tensors in files, by torch.distributed.checkpoint: each process writes what it has, and any number of
processes reads it again, as shares of its own or whole.

The files are safetensors, one a process, whose headers say where in a tensor each part lies. (What PyTorch writes
otherwise has an index that is pickled.) They lie in the folder `shares` of a checkpoint.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.distributed import is_share


def write_shares(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], group: ProcessGroup) -> None:
    """Called by all processes of `group` together, each with its shares; what is whole, one of them writes. Raises the
    OSError of whichever process had one, on all of them."""
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()  # safetensors takes no two tensors of the same memory, as tied weights are
    for part, parts in tensors.items():
        for name, tensor in parts.items():
            tensor = tensor.detach()
            if not is_share(tensor):
                tensor = tensor.contiguous()
                storage = tensor.untyped_storage().data_ptr()
                tensor = tensor.clone() if storage in seen else tensor
                seen.add(storage)
            flat[f"{part}/{name}"] = tensor
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with quiet():
            dcp.save(flat, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from error
        raise


def read_shares(folder: Path, part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `write_shares` was given under the name `part`; as shares where `like` has one of the same shape
    under the name, or under what follows a `/` in it (exp_avg/layers.0.weight), and else whole."""
    reader = HuggingFaceStorageReader(str(folder))
    found: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        owner, _, name = key.partition("/")
        if owner == part and isinstance(stored, TensorStorageMetadata):
            share = like.get(name, like.get(name.partition("/")[2]))
            if share is not None and is_share(share) and share.shape == stored.size:
                found[key] = torch.empty_like(share, dtype=stored.properties.dtype).detach()
            else:
                found[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
    if found:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(found, storage_reader=reader, no_dist=True)  # each process reads what it needs, and asks nobody
    return {key.partition("/")[2]: tensor for key, tensor in found.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's own lines on what it plans."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
