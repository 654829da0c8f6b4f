"""Zip files that claim more than they hold, and that hold more than they should."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common import packed_files
from common.errors import UserError
from common.foreign_weights import read_weights
from common.packed_files import LIMIT, opened_npz
from images.sources import open_npz
from metrics.statistics import read_npz

ZEROS = np.zeros((300, 64, 64), np.uint8)  # 1.2 MB


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """ZEROS in a file a thousand times as small."""
    np.savez_compressed(tmp_path / "zeros.npz", images=ZEROS)
    return tmp_path / "zeros.npz"


@pytest.mark.parametrize(
    "read", [lambda path: open_npz(path, "train").images[..., 0], lambda path: read_npz(path)["images"]]
)
def test_arrays_that_unpack_to_far_more_than_their_file_are_refused_unless_allowed(read, packed: Path, monkeypatch):
    assert np.array_equal(read(packed), ZEROS)  # small for any machine
    monkeypatch.setattr(packed_files, "FREE", 0.001)
    with pytest.raises(
        UserError, match=rf"unpacks to 0\.0 GB, more than .*; if you trust it, set {LIMIT}=1 in the env"
    ):
        read(packed)
    monkeypatch.setenv(LIMIT, "1")
    assert np.array_equal(read(packed), ZEROS)
    monkeypatch.setenv(LIMIT, "much")
    with pytest.raises(UserError, match=rf"{LIMIT}=much in the environment, expected gigabytes"):
        read(packed)


def test_arrays_that_are_not_packed_may_be_of_any_size(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(packed_files, "FREE", 0.001)
    np.savez(tmp_path / "zeros.npz", images=ZEROS)
    assert len(open_npz(tmp_path / "zeros.npz", "train")) == len(ZEROS)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_array_that_claims_another_size_than_its_file_is_refused_before_it_is_read(version, tmp_path: Path):
    path = tmp_path / "claims.npz"
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros(8, np.uint8), version=version)
    content = buffer.getvalue().replace(b"(8,)", b"(9,)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", content)
    with pytest.raises(UserError, match=r"images\.npy claims \d+ bytes and has \d+\): it is damaged"), opened_npz(path):
        pass


def test_arrays_of_objects_are_refused_before_anything_of_them_is_read(tmp_path: Path):
    np.savez(tmp_path / "objects.npz", images=np.array([{}, None], dtype=object))
    with pytest.raises(UserError, match="holds arrays of Python objects, which are not read because they may run code"):
        read_npz(tmp_path / "objects.npz")


def test_weights_that_are_packed_are_held_to_the_same_limit(tmp_path: Path, monkeypatch):
    torch.save({"a": torch.zeros(300_000)}, tmp_path / "plain.pt")
    archive = zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, archive:
        for member in plain.infolist():
            archive.writestr(member.filename, plain.read(member))
    monkeypatch.setattr(packed_files, "FREE", 0.001)
    assert read_weights(tmp_path / "plain.pt")["a"].numel() == 300_000  # as torch.save writes it, whatever its size
    with pytest.raises(UserError, match=r"packed\.pt unpacks to"):
        read_weights(tmp_path / "packed.pt")
