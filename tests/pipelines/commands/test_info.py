"""`zellige info` of folders; of files see test_compress.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pipelines.codec.archive import Archive, read_archive, write_archive
from pipelines.codec.codec import Codec
from pipelines.commands.info import InfoConfig, describe_file

EARLIER = Path(__file__).parents[2] / "earlier_builds"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of one image each, one of them in a subfolder."""
    for name, place in (("prior", "a"), ("packed", "b"), ("table", "below/c")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(EARLIER / "zlg" / f"{name}.zlg", tmp_path / f"{place}.zlg")
    return tmp_path


def test_a_folder_is_told_in_sum(folder):
    one_by_one = [describe_file(InfoConfig(file=str(path))) for path in sorted(folder.rglob("*.zlg"))]
    size = sum(path.stat().st_size for path in folder.rglob("*.zlg"))
    lines = describe_file(InfoConfig(file=str(folder))).splitlines()
    assert lines[0].startswith(f"{folder}: 3 files, 3 images, {size} bytes (")
    assert lines[0].endswith(f", {8 * size / (3 * 256):.4f} bits per pixel")
    assert lines[1] == "mode: prior (1), packed (1), table (1)"
    (autoencoder,) = {text.splitlines()[3] for text in one_by_one}
    assert lines[3] == autoencoder  # one for all files: no numbers
    (folder / "a.zlg").write_bytes(b"no such file")
    with pytest.raises(UserError, match=r"a.zlg is no .zlg file"):
        describe_file(InfoConfig(file=str(folder)))


def test_a_folder_of_something_else_is_told_with_its_command(model, tmp_path):
    message = f"{model} is an assembled model, expected a .zlg file or a folder of them; try: zellige generate"
    with pytest.raises(UserError, match=message):
        describe_file(InfoConfig(file=str(model)))
    with pytest.raises(UserError, match=r"holds no .zlg files; name a .zlg file or a folder of them$"):
        describe_file(InfoConfig(file=str(tmp_path)))


def test_a_model_is_held_against_one_file_only(folder, model):
    with pytest.raises(UserError, match="is a folder: a model is held against one file"):
        describe_file(InfoConfig(file=str(folder), model=str(model)))


def test_a_file_whose_image_cannot_be_decoded_is_named(tmp_path):
    archive = read_archive((EARLIER / "zlg" / "packed.zlg").read_bytes())
    codec = Codec.from_pretrained(EARLIER / "model")
    entry = archive.entries[0]._replace(crc=5)
    path = tmp_path / "edited.zlg"
    path.write_bytes(write_archive(Archive((entry,), codec.stage1)))
    Image.fromarray(np.zeros((entry.shape.height, entry.shape.width), dtype=np.uint8)).save(tmp_path / "a.png")
    config = InfoConfig(file=str(path), model=str(EARLIER / "model"), against=str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"edited.zlg was edited: its codes do not have the checksum"):
        describe_file(config)
