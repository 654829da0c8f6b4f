from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from common import tensor_files
from common.errors import UserError
from common.files import atomic_file
from common.tensor_files import load_tensors, save_tensors


def test_tied_sliced_and_transposed_tensors_come_back_whole(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "tied": base,
        "row": base[1],
        "turned": base.T,
        "bf16": base.bfloat16(),
        "none": base[:0],
    }
    save_tensors(tensors, tmp_path / "a.safetensors")
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_permissions_are_those_of_any_other_file(tmp_path: Path):
    (tmp_path / "other").touch()
    save_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_is_reported_as_one_although_safetensors_hides_it(tmp_path, monkeypatch):
    def save_file(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", save_file)
    path = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match="No space left") as caught:
        save_tensors({"a": torch.zeros(3)}, path)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(UserError, match="the disk is full"), atomic_file(path.with_name("b")) as temporary:
        save_tensors({"a": torch.zeros(3)}, temporary)


@pytest.mark.skipif(os.name != "posix", reason="needs a file size limit")
def test_safetensors_still_words_a_refused_write_as_we_read_it(tmp_path: Path):
    # A file size limit is the one refusal that needs no privileges: the message must still hold "(os error N)".
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"[Ff]ile too large"):
            save_tensors({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_truncated_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SafetensorError):
        load_tensors(path)
