"""Codes and their shards: what is written is read, lazily and from any process, and what is damaged is refused."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codes.shard_folder import map_tensors
from codes.shards import CodeDataset, CodeIndex, CodeShardWriter, smallest_type
from codes.spec import Codes, CodeSpec, Grid
from common.errors import UserError
from training.data import Loader

SPEC = CodeSpec((Grid("top", 2, 3, 200), Grid("bottom", 4, 6, 1000)), 32, 48, 3)


def random_codes(count: int, seed: int, spec: CodeSpec = SPEC) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(grid.vocabulary, (count, grid.height, grid.width), generator=generator) for grid in spec.grids
    )


Content = list[tuple[str, Codes, Tensor, list[str]]]


def write_folder(folder: Path, counts: tuple[int, ...] = (5, 3, 4), **options: Any) -> Content:
    """Shards of `counts` images, the last for validation; returns what they hold."""
    splits = ["train"] * (len(counts) - 1) + ["validation"]
    options = {
        "class_names": ["a", "b", "c"],
        "stage1_fingerprint": "f",
        "source": {"set": "here"},
        **options,
    }
    writer = CodeShardWriter(folder, SPEC, splits, **options)
    content = []
    for number, count in enumerate(counts):
        labels = torch.arange(count) % 3
        names = [f"{number}/ä {index}.png" for index in range(count)]
        content.append((splits[number], random_codes(count, number), labels, names))
    for number in reversed(range(len(counts))):  # the order does not matter
        writer.write(number, *content[number][1:])
    writer.finish()
    return content


def test_a_spec_counts_codes_and_bits() -> None:
    assert SPEC.codes_per_image == 30
    assert SPEC.bits_per_image == pytest.approx(6 * np.log2(200) + 24 * np.log2(1000))
    assert SPEC.image_dimensions == 32 * 48 * 3
    assert SPEC.describe() == "2x3 codes of 200 + 4x6 codes of 1000 (32x48x3 images)"
    assert CodeSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    with pytest.raises(UserError, match="not a description of codes"):
        CodeSpec.from_json({"grids": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda top, bottom: (top,), "got codes of 1 grids, expected 2"),
        (lambda top, bottom: (top, bottom[:, 1:]), "grid 'bottom' has shape (3, 6), expected 4x6"),
        (lambda top, bottom: (top - 200, bottom), "grid 'top' holds codes from -"),
        (lambda top, bottom: (top, bottom + 999), "expected 0 to 999"),
    ],
)
def test_codes_that_do_not_fit_are_not_written(tmp_path: Path, change: Any, message: str) -> None:
    writer = CodeShardWriter(tmp_path, SPEC, ["train"])
    with pytest.raises(UserError, match=re.escape(message)):
        writer.write(0, change(*random_codes(3, 0)), torch.zeros(3), ["x", "y", "z"])
    assert list(tmp_path.glob("*.safetensors")) == []


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = write_folder(tmp_path)
    for split in ("train", "validation"):
        parts = [part for part in content if part[0] == split]
        dataset = CodeDataset(tmp_path, split)
        codes = tuple(torch.cat(grids) for grids in zip(*(part[1] for part in parts), strict=True))
        labels, names = torch.cat([part[2] for part in parts]), [name for part in parts for name in part[3]]
        assert len(dataset) == len(labels)
        assert dataset.code_spec == SPEC
        assert dataset.class_names == ("a", "b", "c")
        assert dataset.num_classes == 3
        assert dataset.stage1_fingerprint == "f"
        assert dataset.names() == names
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        order = torch.cat([order, order[:2]])
        batch = dataset.fetch(order.tolist(), range(len(order)))
        for grid, expected in zip(batch["codes"], codes, strict=True):
            assert grid.dtype == torch.int64
            assert torch.equal(grid, expected[order])
        assert torch.equal(batch["labels"], labels[order])
        assert batch["labels"].dtype == torch.int64
        dataset.verify()


def test_the_format_is_what_the_documentation_says(tmp_path: Path) -> None:
    content = write_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "codes-00000-of-00003.safetensors",
        "codes-00001-of-00003.safetensors",
        "codes-00002-of-00003.safetensors",
        "index.json",
    ]
    tensors = load_file(tmp_path / "codes-00001-of-00003.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "codes.top": torch.uint8,
        "codes.bottom": torch.uint16,
        "labels": torch.int32,
        "names": torch.uint8,
    }
    assert bytes(tensors["names"].tolist()).decode().split("\0") == content[1][3]
    index = json.loads((tmp_path / "index.json").read_text())
    assert list(index) == [
        *("zellige_version", "images", "code_spec", "class_names", "stage1_fingerprint", "source", "shards"),
        *("latents_sha256", "codes_are_bits", "sha256"),
    ]
    assert index["images"] == {"train": 8, "validation": 4}
    assert [(shard["split"], shard["images"]) for shard in index["shards"]] == [
        ("train", 5),
        ("train", 3),
        ("validation", 4),
    ]


def test_the_smallest_type_holds_the_largest_code() -> None:
    for vocabulary in (2, 256, 257, 65536, 65537, 2**32, 2**32 + 1):
        dtype = smallest_type(vocabulary)
        largest = torch.tensor([vocabulary - 1])
        assert largest.to(dtype).to(torch.int64) == largest
        assert dtype.itemsize == (
            1 if vocabulary <= 2**8 else 2 if vocabulary <= 2**16 else 4 if vocabulary <= 2**32 else 8
        )


@pytest.mark.parametrize("vocabulary", [256, 65536, 2**20])
def test_extreme_codes_survive(tmp_path: Path, vocabulary: int) -> None:
    spec = CodeSpec((Grid("codes", 1, 2, vocabulary),), 8, 8, 1)
    writer = CodeShardWriter(tmp_path, spec, ["train"])
    writer.write(0, (torch.tensor([[[0, vocabulary - 1]]]),), torch.tensor([-1]), ["x"])
    writer.finish()
    batch = CodeDataset(tmp_path).fetch([0], [0])
    assert batch["codes"][0].tolist() == [[[0, vocabulary - 1]]]
    assert batch["labels"].tolist() == [-1]


def test_a_folder_without_classes_or_held_out_images(tmp_path: Path) -> None:
    writer = CodeShardWriter(tmp_path, SPEC, ["train", "train"])
    writer.write(0, random_codes(0, 0), torch.zeros(0), [])  # all its images were unreadable
    writer.write(1, random_codes(2, 0), torch.full((2,), -1), ["x", "y"])
    writer.finish()
    dataset = CodeDataset(tmp_path)
    assert dataset.class_names is None
    assert dataset.num_classes == 0
    assert dataset.names() == ["x", "y"]
    assert dataset.fetch([1], [0])["labels"].tolist() == [-1]
    assert len(CodeDataset(tmp_path, "validation")) == 0


def test_shards_are_mapped_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    tensors = map_tensors(tmp_path / "codes-00000-of-00003.safetensors")
    for tensor in tensors.values():
        base: Any = tensor
        while not isinstance(base, np.memmap):
            assert base.base is not None
            base = base.base
        assert not tensor.flags.writeable


def test_a_pickled_dataset_holds_no_codes(tmp_path: Path) -> None:
    spec = CodeSpec((Grid("codes", 32, 32, 512),), 256, 256, 3)
    writer = CodeShardWriter(tmp_path, spec, ["train"])
    writer.write(0, random_codes(200, 0, spec), torch.zeros(200), [str(index) for index in range(200)])
    writer.finish()
    dataset = CodeDataset(tmp_path)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 5000
    copy = pickle.loads(pickled)
    assert torch.equal(copy.fetch([150], [0])["codes"][0], dataset.fetch([150], [0])["codes"][0])


def test_loader_processes_read_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path)
    dataset = CodeDataset(tmp_path)
    requests = [[(index, index) for index in rows] for rows in ([7, 0, 5], [4, 3, 6])]
    loader = Loader(dataset, requests, workers=2, prefetch=2, device=torch.device("cpu"))
    for request, batch in zip(requests, loader, strict=True):
        expected = dataset.fetch(*zip(*request, strict=True))
        assert torch.equal(batch["codes"][1], expected["codes"][1])


def test_a_folder_that_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*missing; name one that `zellige encode` has completed"):
        CodeDataset(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no index\.json: name a folder that `zellige encode` has completed"):
        CodeDataset(tmp_path)
    writer = CodeShardWriter(tmp_path, SPEC, ["train", "validation"])
    writer.write(0, random_codes(2, 0), torch.zeros(2), ["x", "y"])
    with pytest.raises(UserError, match="holds an unfinished encoding"):
        CodeDataset(tmp_path)
    with pytest.raises(UserError, match=r"lacks codes-00001-of-00002\.safetensors"):
        writer.finish()


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-50])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "header":
        path.write_bytes(content[:8] + b"x" + content[9:])
    elif kind == "length":
        path.write_bytes(b"\xff" * 8 + content[8:])
    elif kind == "flipped":
        path.write_bytes(content[:-60] + bytes([content[-60] ^ 1]) + content[-59:])


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "header", "length"])
def test_a_damaged_shard_is_refused_before_training(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path)
    damage(tmp_path / "codes-00001-of-00003.safetensors", kind)
    with pytest.raises(UserError, match=r"codes-00001-of-00003\.safetensors is missing or damaged"):
        CodeDataset(tmp_path)
    CodeDataset(tmp_path, "validation")  # which is whole


def test_one_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    write_folder(tmp_path)
    damage(tmp_path / "codes-00001-of-00003.safetensors", "flipped")
    dataset = CodeDataset(tmp_path)
    with pytest.raises(UserError, match=r"codes-00001-of-00003\.safetensors is damaged: its checksum"):
        dataset.verify()


LATENTS = {"codebook": torch.arange(6.0).view(3, 2), "phi_bias": torch.ones(1, 2)}


def test_latents_lie_beside_the_codes_where_they_are_given(tmp_path: Path) -> None:
    write_folder(tmp_path / "with", latents=LATENTS)
    write_folder(tmp_path / "without")
    found = CodeDataset(tmp_path / "with", "validation").latents()
    assert found is not None
    assert found.keys() == LATENTS.keys()
    assert all(torch.equal(found[name], LATENTS[name]) for name in found)
    without = CodeDataset(tmp_path / "without")
    assert without.latents() is None
    assert without.index.latents_sha256 is None
    assert "latents.safetensors" not in files_of(tmp_path / "without")


@pytest.mark.parametrize("kind", ["missing", "flipped"])
def test_damaged_latents_are_refused_and_written_anew(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, latents=LATENTS)
    whole = files_of(tmp_path)
    damage(tmp_path / "latents.safetensors", kind)
    with pytest.raises(
        UserError, match=r"latents\.safetensors is missing or damaged: its checksum .* run its `zellige"
    ):
        CodeDataset(tmp_path).latents()
    with pytest.raises(UserError, match=r"latents\.safetensors is missing or damaged"):
        CodeDataset(tmp_path).verify()
    write_folder(tmp_path, latents=LATENTS)
    assert files_of(tmp_path) == whole


def test_an_index_without_latents_of_an_earlier_version_is_read_and_completed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "index.json"
    value = json.loads(path.read_text())
    del value["latents_sha256"], value["sha256"]
    path.write_text(json.dumps(value))
    assert CodeDataset(tmp_path).latents() is None
    write_folder(tmp_path, latents=LATENTS)
    assert CodeDataset(tmp_path).latents() is not None


def test_a_shard_of_another_encoding_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "one")
    write_folder(tmp_path / "other", (6, 3, 4))
    name = "codes-00000-of-00003.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(UserError, match=r"has shape \(6,.*\), expected \(5,"):
        CodeDataset(tmp_path / "one")


@pytest.mark.parametrize("content", ["{", "[]", '{"class_names": null}', '{"class_names": 1}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is not"):
        CodeDataset(tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_writer_continues_where_another_stopped(tmp_path: Path) -> None:
    content = write_folder(tmp_path / "whole")
    options = {"class_names": ["a", "b", "c"], "stage1_fingerprint": "f", "source": {"set": "here"}}
    splits = [part[0] for part in content]
    first = CodeShardWriter(tmp_path / "broken", SPEC, splits, **options)
    first.write(2, *content[2][1:])
    first.write(0, *content[0][1:])
    damage(tmp_path / "broken" / "codes-00000-of-00003.safetensors", "truncated")
    second = CodeShardWriter(tmp_path / "broken", SPEC, splits, **options)
    assert [second.written(number) is not None for number in range(3)] == [False, False, True]
    for number in (0, 1):
        second.write(number, *content[number][1:])
    second.finish()
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


def test_a_complete_folder_can_be_repaired(tmp_path: Path) -> None:
    content = write_folder(tmp_path)
    before = files_of(tmp_path)
    damage(tmp_path / "codes-00001-of-00003.safetensors", "flipped")
    write_folder_again = CodeShardWriter(
        tmp_path,
        SPEC,
        [part[0] for part in content],
        class_names=("a", "b", "c"),
        stage1_fingerprint="f",
        source={"set": "here"},
    )
    assert [write_folder_again.written(number) is not None for number in range(3)] == [True, False, True]
    write_folder_again.write(1, *content[1][1:])
    write_folder_again.finish()
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({"stage1_fingerprint": "g"}, "stage1_fingerprint"),
        ({"class_names": None}, "class_names"),
        ({"source": {"set": "there"}}, "set"),
        ({"counts": (5, 3, 4, 1)}, "shards"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_other_codes_are_not_mixed_in(tmp_path: Path, changes: dict[str, Any], different: str, complete: bool) -> None:
    write_folder(tmp_path)
    if not complete:
        index = CodeIndex.read(tmp_path / "index.json")
        (tmp_path / "index.json").unlink()
        (tmp_path / "unfinished").mkdir()
        plan = replace(index, shards=tuple(replace(shard, images=0, sha256="") for shard in index.shards))
        (tmp_path / "unfinished" / "index.json").write_text(json.dumps(plan.to_json()))
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=rf"holds other codes than these \(different: {different}\)"):
        write_folder(tmp_path, **changes)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_while_shards_are_made_anew_a_complete_folder_is_unfinished(tmp_path: Path) -> None:
    write_folder(tmp_path)
    before = files_of(tmp_path)

    def writer_again() -> CodeShardWriter:
        facts = {"class_names": ["a", "b", "c"], "stage1_fingerprint": "f", "source": {"set": "here"}}
        return CodeShardWriter(tmp_path, SPEC, ["train", "train", "validation"], **facts)

    writer = writer_again()
    writer.reopen()
    with pytest.raises(UserError, match="holds an unfinished encoding"):
        CodeDataset(tmp_path)
    again = writer_again()  # after a kill
    assert all(again.written(number) is not None for number in range(3))
    again.finish()
    assert files_of(tmp_path) == before
