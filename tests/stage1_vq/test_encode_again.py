"""Codes that are there already: continued byte for byte, made anew where the images changed, else refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codes.shards import CodeDataset, CodeShardWriter
from codes.spec import Codes
from common.errors import UserError
from images.datasets import image_datasets, to_float
from images.encoding import EncodeDataConfig
from stage1_vq.autoencoders import VQVAE
from stage1_vq.encode import encode
from tests.stage1_vq.encoded_images import config, data_of, files_of, save_run, save_set, tiny_vqvae


class PowerCut(BaseException):
    """Not an Exception, so that nothing in between can handle it."""


@pytest.mark.parametrize("calls", [1, 3, 5, 7])
def test_interrupted_and_continued_is_the_same_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "set")))
    encode(config(run, tmp_path / "whole", augment_copies=2))
    whole = files_of(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("codes-")]) == 7

    encode_batch = VQVAE.encode
    made: list[int] = []

    def until_the_power_is_cut(self: VQVAE, images: torch.Tensor) -> Codes:
        made.append(len(images))
        if len(made) == 2 * calls:
            raise PowerCut
        return encode_batch(self, images)

    monkeypatch.setattr(VQVAE, "encode", until_the_power_is_cut)
    with pytest.raises(PowerCut):
        encode(config(run, tmp_path / "codes", augment_copies=2))
    left = set(files_of(tmp_path / "codes"))
    assert "index.json" not in left
    done = calls - 1  # a shard takes two batches
    assert len([name for name in left if name.startswith("codes-")]) == done
    made.clear()
    monkeypatch.setattr(VQVAE, "encode", lambda self, images: (made.append(1), encode_batch(self, images))[1])
    encode(config(run, tmp_path / "codes", augment_copies=2))
    assert files_of(tmp_path / "codes") == whole
    assert len(made) <= 2 * (7 - done)  # finished shards are not encoded again


def test_a_complete_folder_costs_nothing_and_a_damaged_one_only_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "set")))
    encode(config(run, tmp_path / "codes"))
    before = files_of(tmp_path / "codes")
    written: list[int] = []
    write = CodeShardWriter.write
    monkeypatch.setattr(
        CodeShardWriter,
        "write",
        lambda self, number, *rest: (written.append(number), write(self, number, *rest)),
    )
    encode(config(run, tmp_path / "codes"))
    assert written == []
    shard = tmp_path / "codes" / "codes-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    encode(config(run, tmp_path / "codes"))
    assert written == [1]
    assert files_of(tmp_path / "codes") == before


def test_codes_of_another_model_or_other_images_are_refused(tmp_path: Path) -> None:
    root = save_set(tmp_path / "set")
    run = save_run(tmp_path / "run", data_of(root))
    encode(config(run, tmp_path / "codes"))
    with pytest.raises(UserError, match=r"holds other codes than these \(different: shard_size\)"):
        encode(config(run, tmp_path / "codes", shard_size=6))
    (root / "a" / "003.png").rename(root / "a" / "new.png")
    with pytest.raises(UserError, match=r"\(different: train_images, validation_images\)"):
        encode(config(run, tmp_path / "codes"))
    (root / "a" / "new.png").rename(root / "a" / "003.png")
    model = tiny_vqvae()
    torch.nn.init.zeros_(model.encoder[0].weight)
    model.save_pretrained(run / "model")
    with pytest.raises(UserError, match=r"\(different: stage1_fingerprint\)"):
        encode(config(run, tmp_path / "codes"))


def test_codes_are_not_written_among_photos_or_into_another_command_s_folder(tmp_path: Path) -> None:
    root = save_set(tmp_path / "set")
    run = save_run(tmp_path / "run", data_of(root))
    before = files_of(root)
    with pytest.raises(UserError, match=r"holds a/000.png, which this command did not write; name another --out"):
        encode(config(run, root))
    with pytest.raises(UserError, match=r"run is a folder which `zellige train` began; name another --out folder"):
        encode(config(run, run))
    assert files_of(root) == before


def test_shards_of_images_that_changed_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = save_set(tmp_path / "set")
    run = save_run(tmp_path / "run", data_of(root))
    encode(config(run, tmp_path / "codes"))
    before = files_of(tmp_path / "codes")
    changed = root / CodeDataset(tmp_path / "codes").names()[6]  # in the second shard
    times = os.stat(changed)
    Image.fromarray(255 - np.asarray(Image.open(changed))).save(changed)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns - 10**12))  # replaced by an older file
    made: list[int] = []
    write = CodeShardWriter.write

    def noted(self: CodeShardWriter, number: int, *content: Any) -> None:
        made.append(number)
        with pytest.raises(UserError, match="holds an unfinished encoding"):  # nobody reads new codes among old ones
            CodeDataset(tmp_path / "codes")
        write(self, number, *content)

    monkeypatch.setattr(CodeShardWriter, "write", noted)
    encode(config(run, tmp_path / "codes"))
    assert made == [1]
    codes = CodeDataset(tmp_path / "codes")
    codes.verify()
    pixels = image_datasets(data_of(root), 0)[0].without_augmentation().fetch([6], [6])["images"]
    assert torch.equal(codes.fetch([6], [6])["codes"][0], tiny_vqvae().encode(to_float(pixels))[0])
    after = files_of(tmp_path / "codes")
    assert {name for name in before if before[name] != after[name]} == {
        "codes-00001-of-00004.safetensors", "index.json", "sources.jsonl",
    }  # fmt: skip
    encode(config(run, tmp_path / "codes"))
    assert made == [1]


@pytest.mark.parametrize("copied", [True, False])
def test_images_that_moved_are_the_same_and_a_field_at_its_default_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """Also for shards of a build that had neither the field nor a record of sources."""
    root = save_set(tmp_path / "set")
    run = save_run(tmp_path / "run", data_of(root))
    encode(config(run, tmp_path / "codes"))
    index = json.loads((tmp_path / "codes" / "index.json").read_text())
    del index["source"]["data.shift"], index["sha256"]
    (tmp_path / "codes" / "index.json").write_text(json.dumps(index))
    if copied:
        shutil.copytree(root, tmp_path / "scratch", copy_function=shutil.copyfile)  # with times of its own
    else:
        (tmp_path / "codes" / "sources.jsonl").unlink()
        root.rename(tmp_path / "scratch")
    monkeypatch.setattr(VQVAE, "encode", None)  # nothing is encoded again
    encode(config(run, tmp_path / "codes", data=EncodeDataConfig(path=str(tmp_path / "scratch"))))
    save_run(tmp_path / "run", data_of(root, flip=False))
    with pytest.raises(UserError, match=r"\(different: data.flip\)"):
        encode(config(run, tmp_path / "codes", data=EncodeDataConfig(path=str(tmp_path / "scratch"))))
