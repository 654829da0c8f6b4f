"""codes info, verify and export: what stands in the shards is shown, checked, and arrives in other formats."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codes.shards import CodeDataset, CodeShardWriter
from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from common.files import read_json, sha256_of_file, write_json
from common.sealed_json import sealed
from common.tensor_files import load_tensors, save_tensors
from pipelines.cli import main
from pipelines.commands import codes as code_shards
from pipelines.commands.codes import CodesExportConfig, CodesInfoConfig, CodesVerifyConfig, export, info, verify
from tests.pipelines.conftest import make_autoencoder

SPEC = CodeSpec((Grid("top", 2, 3, 4), Grid("bottom", 4, 6, 1000)), 32, 48, 3)
NAMES = [f"ä/{index}.png" for index in range(7)]


def random_codes(count: int, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(g.vocabulary, (count, g.height, g.width), generator=generator) for g in SPEC.grids)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training shards of 4 and 3 images and one of 2 held-out images, one without a label."""
    return write_folder(tmp_path / "codes")


def write_folder(folder: Path, names: list[str] = NAMES, **source: Any) -> Path:
    writer = CodeShardWriter(folder, SPEC, ["train", "train", "validation"], class_names=["a", "b"], source=source)
    writer.write(0, random_codes(4, 0), torch.tensor([0, 1, 0, -1]), names[:4])
    writer.write(1, random_codes(3, 1), torch.tensor([1, 1, 0]), names[4:])
    writer.write(2, random_codes(2, 2), torch.tensor([0, 1]), ["x.png", "y.png"])
    writer.finish()
    return folder


def test_info_counts_images_and_codes(folder):
    shown = info(CodesInfoConfig(codes=str(folder)))
    assert "7 training and 2 held-out images as 2x3 codes of 4 + 4x6 codes of 1000 (32x48x3 images)" in shown
    assert "classes:     2: a, b\n" in shown
    top, bottom = CodeDataset(folder).fetch(range(7), range(7))["codes"]
    for grid, codes in (("top", top), ("bottom", bottom)):
        shares = torch.unique(codes, return_counts=True)[1] / codes.numel()
        entropy = -(shares * shares.log2()).sum()
        assert f"training codes of {grid}: {len(shares)} of " in shown
        assert f"entropy {entropy:.2f} of " in shown


def test_info_of_evenly_used_codes_is_the_whole_vocabulary():
    assert code_shards.describe_counts(np.full(8, 5)) == "8 of 8 used, perplexity 8.0, entropy 3.00 of 3.00 bits"


def test_verify_accepts_what_was_written(folder):
    assert "3 shards, 7 training and 2 held-out images, all checksums right" in verify(
        CodesVerifyConfig(codes=str(folder))
    )


def test_verify_names_a_shard_with_a_flipped_bit(folder):
    path = folder / "codes-00001-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"codes-00001-of-00003\.safetensors is damaged"):
        verify(CodesVerifyConfig(codes=str(folder)))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [("codes.top", 4, "code 4 in grid 'top', expected 0 to 3"), ("labels", 2, "labels from 0 to 2, expected -1 to 1")],
)
def test_verify_looks_at_values_whose_checksum_is_right(folder, tensor, value, message):
    path = folder / "codes-00001-of-00003.safetensors"
    tensors = load_tensors(path)
    tensors[tensor].view(-1)[0] = value
    save_tensors(tensors, path)
    index = read_json(folder / "index.json")
    index["shards"][1]["sha256"] = sha256_of_file(path)
    write_json(folder / "index.json", sealed(index))
    with pytest.raises(UserError, match=message):
        verify(CodesVerifyConfig(codes=str(folder)))


def test_verify_finds_an_image_that_stands_there_twice_unless_copies_were_asked_for(tmp_path):
    twice = [*NAMES[:6], NAMES[0]]
    with pytest.raises(UserError, match=r"'ä/0\.png' 2 times among the train images, expected at most 1"):
        verify(CodesVerifyConfig(codes=str(write_folder(tmp_path / "doubled", twice))))
    verify(CodesVerifyConfig(codes=str(write_folder(tmp_path / "augmented", twice, augment_copies=2))))


def test_verify_tells_codes_of_another_autoencoder(folder, tmp_path):
    make_autoencoder().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="holds codes of autoencoder"):
        verify(CodesVerifyConfig(codes=str(folder), model=str(tmp_path / "model")))


def test_npz_holds_the_codes_labels_and_names(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(code_shards, "CHUNK", 2)  # chunks end inside a shard
    out = tmp_path / "out"
    assert export(CodesExportConfig(codes=str(folder), out=str(out))) == f"2 files in {out}: train.npz, validation.npz"
    expected = CodeDataset(folder).fetch(range(7), range(7))
    with np.load(out / "train.npz") as arrays:
        for grid, codes in zip(SPEC.grids, expected["codes"], strict=True):
            np.testing.assert_array_equal(arrays[f"codes.{grid.name}"], codes.numpy())
        assert arrays["codes.top"].dtype == np.uint8
        assert arrays["codes.bottom"].dtype == np.uint16
        np.testing.assert_array_equal(arrays["labels"], expected["labels"].numpy())
        assert arrays["names"].tolist() == NAMES
        description = json.loads(str(arrays["description"]))
    assert CodeSpec.from_json(description["code_spec"]) == SPEC
    assert description["class_names"] == ["a", "b"]


def test_webdataset_holds_one_sample_an_image_in_files_of_the_wanted_size(folder, tmp_path):
    out = tmp_path / "out"
    config = CodesExportConfig(codes=str(folder), out=str(out), format="webdataset", images_per_file=3)
    assert export(config).startswith(f"4 files in {out}: train-000000.tar, train-000001.tar, train-000002.tar")
    expected = CodeDataset(folder).fetch(range(7), range(7))
    found = 0
    for path in sorted(out.glob("train-*.tar")):
        with tarfile.open(path) as archive:
            content = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        keys = sorted({name.partition(".")[0] for name in content})
        assert len(keys) == (3 if path.name != "train-000002.tar" else 1)
        for key in keys:
            image = int(key)
            for grid, codes in zip(SPEC.grids, expected["codes"], strict=True):
                array = np.load(io.BytesIO(content[f"{key}.{grid.name}.npy"]))
                np.testing.assert_array_equal(array, codes[image].numpy())
            label = int(expected["labels"][image])
            assert content.get(f"{key}.cls") == (None if label < 0 else str(label).encode())
            assert json.loads(content[f"{key}.json"]) == {"name": NAMES[image]}
            found += 1
    assert found == 7


def test_webdataset_reads_the_files(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    export(CodesExportConfig(codes=str(folder), out=str(tmp_path / "out"), format="webdataset"))
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False).decode())
    expected = CodeDataset(folder).fetch(range(7), range(7))
    assert len(samples) == 7
    for image, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["bottom.npy"], expected["codes"][1][image].numpy())
        assert sample["json"]["name"] == NAMES[image]


@pytest.mark.parametrize("kind", ["npz", "webdataset"])
def test_the_same_codes_give_the_same_bytes(folder, tmp_path, kind):
    for name in ("one", "two"):
        export(CodesExportConfig(codes=str(folder), out=str(tmp_path / name), format=kind))
    files = sorted((tmp_path / "one").iterdir())
    assert files
    assert all(path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() for path in files)


def test_an_export_in_other_files_does_not_mix_with_one_that_is_there(folder, tmp_path):
    config = CodesExportConfig(codes=str(folder), out=str(tmp_path / "out"), format="webdataset", images_per_file=3)
    assert export(config) == export(config)
    with pytest.raises(UserError, match="was begun with other settings: images_per_file was 3 and is now 5"):
        export(replace(config, images_per_file=5))


@pytest.mark.parametrize("chunk", [2, 3, 8192])
def test_a_shard_with_a_name_too_many_is_refused(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(code_shards, "CHUNK", chunk)
    folder = write_folder(tmp_path / "codes", [*NAMES, "one too many"])
    for work in (
        lambda: verify(CodesVerifyConfig(codes=str(folder))),
        lambda: export(CodesExportConfig(codes=str(folder), out=str(tmp_path / "out"))),
    ):
        with pytest.raises(UserError, match="names 4 images of 3 in one shard"):
            work()


def test_nothing_is_exported_from_damaged_codes(folder, tmp_path):
    path = folder / "codes-00000-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="is damaged"):
        export(CodesExportConfig(codes=str(folder), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", ["info", "verify", "export"])
def test_every_action_is_a_command_with_help(action, capsys):
    with pytest.raises(SystemExit):
        main(["codes", action, "--help"])
    assert f"usage: zellige codes {action}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("codes", "codes needs an action, got none; the actions are info, verify, export"),
        ("codes inf --codes x", "there is no action of codes 'inf'; did you mean info?"),
        ("codes zzz", "there is no action of codes 'zzz'; the actions are info, verify, export"),
        ("codes info", "missing: --codes; see --help"),
    ],
)
def test_mistakes_are_told_in_one_sentence(line, message, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"zellige: {message}\n"


def test_the_command_prints_what_it_found(folder, capsys):
    assert main(["codes", "verify", "--codes", str(folder)]) == 0
    assert "is sound" in capsys.readouterr().out
