from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from codes.latents import LatentDataset, LatentShardWriter, LatentSpec
from codes.shards import CodeDataset
from common.errors import UserError

SPEC = LatentSpec((3,), True, 8, 6, 1)


def content(count: int, seed: int = 0, spec: LatentSpec = SPEC) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *spec.shape, generator=generator) for name in spec.names}


def write(folder: Path, spec: LatentSpec = SPEC) -> None:
    writer = LatentShardWriter(folder, spec, ["train", "train", "validation"], class_names=["a", "b"], source={"n": 1})
    for number, count in enumerate((4, 3, 2)):
        labels = torch.arange(count) % 2
        names = [f"{number}/{i}.png" for i in range(count)]
        writer.write(number, content(count, number, spec), labels, names)
    writer.finish()


@pytest.mark.parametrize("spec", [SPEC, LatentSpec((2, 3, 4), False, 12, 16, 3)])
def test_what_is_written_is_read(tmp_path: Path, spec: LatentSpec):
    write(tmp_path, spec)
    train, held_out = LatentDataset(tmp_path), LatentDataset(tmp_path, "validation")
    assert (len(train), len(held_out), train.latent_spec, train.class_names) == (7, 2, spec, ("a", "b"))
    batch = train.fetch([6, 0, 5], [0, 0, 0])
    assert set(batch) == {*spec.names, "labels", "numbers"}
    for name in spec.names:
        expected = torch.cat([content(4, 0, spec)[name], content(3, 1, spec)[name]])[[6, 0, 5]]
        assert torch.equal(batch[name], expected)
    assert batch["labels"].tolist() == [0, 0, 1]
    assert batch["numbers"].tolist() == [6, 0, 5]
    assert train.names() == ["0/0.png", "0/1.png", "0/2.png", "0/3.png", "1/0.png", "1/1.png", "1/2.png"]
    train.verify()


def test_the_index_says_what_the_documentation_says(tmp_path: Path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert list(index) == [
        *("zellige_version", "images", "latent_spec", "class_names", "stage1_fingerprint", "source", "shards"),
        "sha256",
    ]
    assert index["latent_spec"] == {
        **{"shape": [3], "scales": True},
        **{"image_height": 8, "image_width": 6, "image_channels": 1},
    }
    assert [shard["file"] for shard in index["shards"]] == [f"latents-0000{i}-of-00003.safetensors" for i in range(3)]
    assert LatentSpec.from_json(index["latent_spec"]) == SPEC


def test_fingerprints_tell_contents_apart(tmp_path: Path):
    for name in ("one", "same", "other"):
        write(tmp_path / name)
    writer = LatentShardWriter(tmp_path / "moved", SPEC, ["train"])
    writer.write(0, content(4), torch.zeros(4), list("abcd"))
    writer.finish()
    one, same, moved = (LatentDataset(tmp_path / name).fingerprint() for name in ("one", "same", "moved"))
    assert one == same != moved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(4, 2)}, r"mean of latents has shape \(2,\), expected \(3,\)"),
        ({"log_scale": torch.full((4, 3), torch.nan)}, "log_scale of latents holds numbers that are not finite"),
        ({"other": torch.zeros(4, 3)}, "got latents of log_scale, mean, other, expected mean and log_scale"),
    ],
)
def test_latents_that_do_not_fit_are_not_written(tmp_path: Path, change: dict[str, torch.Tensor], message: str):
    writer = LatentShardWriter(tmp_path, SPEC, ["train"])
    with pytest.raises(UserError, match=message):
        writer.write(0, {**content(4), **change}, torch.zeros(4), list("abcd"))
    assert not list(tmp_path.glob("latents*"))


def test_a_writer_continues_where_another_stopped(tmp_path: Path):
    write(tmp_path / "whole")
    first = LatentShardWriter(tmp_path / "parts", SPEC, ["train", "train", "validation"], class_names=["a", "b"])
    first.write(0, content(4), torch.arange(4) % 2, [f"0/{i}.png" for i in range(4)])
    with pytest.raises(UserError, match="unfinished encoding"):
        LatentDataset(tmp_path / "parts")
    with pytest.raises(UserError, match="lacks latents-00001"):
        first.finish()
    again = LatentShardWriter(tmp_path / "parts", SPEC, ["train", "train", "validation"], class_names=["a", "b"])
    assert again.written(0) is not None
    assert again.written(1) is None
    other = replace(SPEC, shape=(4,))
    with pytest.raises(UserError, match=r"holds other latents than these \(different: latent_spec\)"):
        LatentShardWriter(tmp_path / "parts", other, ["train", "train", "validation"], class_names=["a", "b"])


def test_damage_is_found(tmp_path: Path):
    write(tmp_path)
    file = tmp_path / "latents-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="its checksum is not that of"):
        LatentDataset(tmp_path).verify()
    file.write_bytes(data[:-8])
    with pytest.raises(UserError, match="is missing or damaged"):
        LatentDataset(tmp_path)


def test_latents_are_mapped_not_pickled(tmp_path: Path):
    write(tmp_path)
    dataset = LatentDataset(tmp_path)
    assert all(isinstance(array.base, np.memmap | np.ndarray) for array in dataset.maps[0].values())
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.fetch([2], [0])["mean"], dataset.fetch([2], [0])["mean"])
    assert len(pickle.dumps(dataset)) < 3000


def test_latents_are_no_codes(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(UserError, match="holds latent shards, expected code shards; name another folder"):
        CodeDataset(tmp_path)
