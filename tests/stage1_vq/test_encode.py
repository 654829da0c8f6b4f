"""Encoding: the codes of every image once, the same files however many write them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import common.sources
from codes.shards import CodeDataset, CodeIndex, CodeShardWriter
from common import computing
from common.errors import UserError
from images.datasets import image_datasets, to_float
from images.encoding import EncodeConfig, EncodeDataConfig
from stage1_vq.autoencoders import AUTOENCODERS, VQVAE, VQVAE2Config, VQVAEConfig
from stage1_vq.encode import encode, encode_images
from stage1_vq.quantizers import (
    BinaryQuantizerConfig,
    BSQConfig,
    FSQConfig,
    GroupedQuantizerConfig,
    LFQConfig,
    MultiscaleQuantizerConfig,
    NearestQuantizerConfig,
    ResidualQuantizerConfig,
)
from tests.processes import Processes
from tests.stage1_vq.encoded_images import config, data_of, files_of, save_run, save_set, tiny_vqvae


def test_every_image_is_encoded_once_in_its_part(tmp_path: Path) -> None:
    data = data_of(save_set(tmp_path / "set"))
    run = save_run(tmp_path / "run", data)
    summary = encode(config(run, tmp_path / "codes"))
    assert summary == (
        f"14 training and 4 held-out images as 2x2 codes of 300 (8x8x1 images), 33 bits per image, in "
        f"{tmp_path / 'codes'}; next: zellige train-stage2 --config RECIPE --codes {tmp_path / 'codes'}"
    )
    model = tiny_vqvae()
    for split, images in zip(("train", "validation"), image_datasets(data, seed=99), strict=True):
        codes = CodeDataset(tmp_path / "codes", split)  # type: ignore[arg-type]
        assert codes.names() == images.names(range(len(images)))
        assert codes.class_names == ("a", "b")
        assert codes.stage1_fingerprint == model.fingerprint()
        batch = images.without_augmentation().fetch(range(len(images)), range(len(images)))
        encoded = codes.fetch(range(len(codes)), range(len(codes)))
        assert torch.equal(encoded["codes"][0], model.encode(to_float(batch["images"]))[0])
        assert torch.equal(encoded["labels"], batch["labels"])
        codes.verify()


def test_codes_have_one_size_also_where_the_run_was_trained_at_several_shapes(tmp_path: Path) -> None:
    data = data_of(save_set(tmp_path / "set"))
    plain = save_run(tmp_path / "plain", data)
    buckets = save_run(tmp_path / "buckets", replace(data, aspect_buckets=3, aspect_limit=1.3))
    for run in (plain, buckets):
        encode(config(run, tmp_path / f"{run.name}_codes"))
    assert files_of(tmp_path / "plain_codes") == files_of(tmp_path / "buckets_codes")


def test_augmented_copies_follow_the_plain_one(tmp_path: Path) -> None:
    data = data_of(save_set(tmp_path / "set"))
    run = save_run(tmp_path / "run", data)
    encode(config(run, tmp_path / "plain"))
    encode(config(run, tmp_path / "copies", augment_copies=3))
    encode(config(run, tmp_path / "other_seed", augment_copies=3, seed=1))
    plain, copies, other = (CodeDataset(tmp_path / name) for name in ("plain", "copies", "other_seed"))
    assert len(copies) == 3 * len(plain) == 42
    assert copies.names() == plain.names() * 3

    def grids(dataset: CodeDataset) -> torch.Tensor:
        return dataset.fetch(range(len(dataset)), range(len(dataset)))["codes"][0]

    first, second, third = grids(copies).chunk(3)
    assert torch.equal(first, grids(plain))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(second, grids(other).chunk(3)[1])
    one, three = (CodeDataset(tmp_path / name, "validation") for name in ("plain", "copies"))
    assert torch.equal(grids(one), grids(three))


def test_augmentation_does_not_depend_on_how_the_images_are_cut_into_shards(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "set")))
    parts = []
    for shard_size in (6, 600):  # multiples of the batch size
        out = tmp_path / f"codes{shard_size}"
        encode(config(run, out, augment_copies=3, shard_size=shard_size))
        parts.append(CodeDataset(out).fetch(range(42), range(42))["codes"][0])
    assert torch.equal(*parts)


def test_copies_of_what_is_never_augmented_are_refused(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "set"), crop="center", flip=False))
    with pytest.raises(UserError, match="augment_copies=2 asks for different copies of each image, but"):
        encode(config(run, tmp_path / "codes", augment_copies=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_named(tmp_path: Path, workers: int) -> None:
    root = save_set(tmp_path / "set", per_class=100)
    for name in ("a/000.png", "b/050.png"):
        (root / name).write_bytes(b"no image")
    run = save_run(tmp_path / "run", data_of(root, validation_count=20))
    summary = encode(config(run, tmp_path / "codes", shard_size=64, workers=workers))
    assert f"; 2 were left out as unreadable, see {tmp_path / 'codes' / 'bad_files.txt'}; next" in summary
    names = [name for split in ("train", "validation") for name in CodeDataset(tmp_path / "codes", split).names()]  # type: ignore[arg-type]
    assert len(names) == 198
    assert not {"a/000.png", "b/050.png"} & set(names)
    recorded = (tmp_path / "codes" / "bad_files.txt").read_text()
    assert str(root / "a/000.png") in recorded
    assert str(root / "b/050.png") in recorded


def test_the_network_leaves_workers_their_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "cores", lambda: 4)
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "images")))
    before, seen = torch.get_num_threads(), []
    encoded = VQVAE.encode
    monkeypatch.setattr(VQVAE, "encode", lambda *given: (seen.append(torch.get_num_threads()), encoded(*given))[1])
    torch.set_num_threads(4)
    try:
        encode(config(run, tmp_path / "codes", workers=1))
        assert set(seen) == {3}
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_too_many_unreadable_images_stop_the_encoding(tmp_path: Path) -> None:
    root = save_set(tmp_path / "set", per_class=100)
    for number in range(6):
        (root / "a" / f"{number:03d}.png").write_bytes(b"no image")
    run = save_run(tmp_path / "run", data_of(root))
    with pytest.raises(
        UserError, match=r"6 of 200 images cannot be read, .* let more pass with --data.max_bad_share 0.06"
    ):
        encode(config(run, tmp_path / "codes"))
    assert not (tmp_path / "codes" / "index.json").exists()
    summary = encode(config(run, tmp_path / "codes", data=EncodeDataConfig(max_bad_share=0.06)))
    assert "; 6 were left out as unreadable, " in summary


def test_given_data_replace_the_run_s(tmp_path: Path) -> None:
    first, second, third = (
        save_set(tmp_path / name, per_class=count) for name, count in (("1", 4), ("2", 5), ("3", 3))
    )
    run = save_run(tmp_path / "run", data_of(first, validation_path=str(third)))

    def counts(**data: Any) -> list[int]:
        out = tmp_path / f"codes{len(list(tmp_path.iterdir()))}"
        encode(config(run, out, data=EncodeDataConfig(**data)))
        index = CodeIndex.read(out / "index.json")
        return [index.images("train"), index.images("validation"), index.code_spec.grids[0].width]

    assert counts() == [8, 6, 2]
    assert counts(path=str(first)) == [8, 6, 2]  # the held-out images are still the run's
    assert counts(path=str(second)) == [8, 2, 2]  # of other images some are held out
    assert counts(path=str(second), validation_share=0.5) == [5, 5, 2]
    assert counts(validation_share=0.5) == [4, 4, 2]  # of the run's images, in place of those it held out
    assert counts(path=str(second), validation_path=str(first)) == [10, 8, 2]
    assert counts(image_size=(8, 16)) == [8, 6, 4]  # any size that the stride divides


def test_a_model_without_its_run_needs_a_path(tmp_path: Path) -> None:
    root, run = save_set(tmp_path / "set"), save_run(tmp_path / "run", None)
    with pytest.raises(
        UserError,
        match=re.escape("is a model without its run, which would tell its images: give --data.path"),
    ):
        encode(config(run, tmp_path / "codes"))
    encode(config(run / "model", tmp_path / "codes", data=EncodeDataConfig(path=str(root))))
    assert len(CodeDataset(tmp_path / "codes")) == 17  # of 18: at least one is held out


def test_a_size_off_the_stride_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "set")))
    with pytest.raises(UserError, match="cannot encode 8x10 images: both sides must be multiples of 4"):
        encode(config(run, tmp_path / "codes", data=EncodeDataConfig(image_size=(8, 10))))
    assert not (tmp_path / "codes").exists()


def test_a_damaged_run_config(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "set")))
    (run / "config.yaml").write_text("data: {pathh: here}")
    with pytest.raises(UserError, match="does not say what the run was trained on"):
        encode(config(run, tmp_path / "codes"))


@pytest.mark.parametrize("field", ["augment_copies", "batch_size", "shard_size"])
def test_a_bad_config_is_refused_when_it_is_built(field: str) -> None:
    with pytest.raises(UserError, match=f"{field}=0, expected at least 1"):
        EncodeConfig(model="m", out="o", **{field: 0})  # type: ignore[arg-type]


def test_arrays_are_encoded_too(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images)
    train, held_out = image_datasets(data_of(tmp_path / "set.npz"), 0)
    index = encode_images(tiny_vqvae(), train, held_out, tmp_path / "codes")
    assert [index.images("train"), index.images("validation")] == [24, 6]
    codes = CodeDataset(tmp_path / "codes")
    assert codes.num_classes == 0
    assert codes.names() == [f"{index:06d}" for index in train.indices]


NEAREST = NearestQuantizerConfig(codebook_size=300, dim=4)
SMALL = {"channels": 1, "width": 8, "residual_width": 8, "residual_blocks": 1}


@pytest.mark.parametrize(
    ("model", "grids"),
    [
        (VQVAE2Config(**SMALL, levels=3, bottom_stride=2, quantizer=NEAREST), {"level0": 1, "level1": 2, "level2": 4}),
        (
            VQVAEConfig(**SMALL, quantizer=ResidualQuantizerConfig(depth=3, layer=NEAREST)),
            {"depth0": 2, "depth1": 2, "depth2": 2},
        ),
        (
            VQVAEConfig(
                **SMALL,
                downsamplings=1,
                quantizer=MultiscaleQuantizerConfig(scales=(1, 2, 4), codebook_size=70_000, dim=4, phis=2),
            ),
            {"scale0": 1, "scale1": 2, "scale2": 4},
        ),
    ],
    ids=["vqvae2", "residual", "multiscale"],
)
def test_several_grids_of_different_sizes_are_written_and_read(tmp_path: Path, model: Any, grids: dict) -> None:
    data = data_of(save_set(tmp_path / "set"))
    run = save_run(tmp_path / "run", data)
    torch.manual_seed(0)
    autoencoder = AUTOENCODERS[model.kind](model, (8, 8)).eval()
    autoencoder.save_pretrained(run / "model")
    encode(config(run, tmp_path / "codes"))
    codes = CodeDataset(tmp_path / "codes")
    assert codes.code_spec == autoencoder.code_spec()
    assert {grid.name: grid.height for grid in codes.code_spec.grids} == grids
    images = image_datasets(data, seed=99)[0].without_augmentation()
    expected = autoencoder.encode(to_float(images.fetch(range(14), range(14))["images"]))
    found = codes.fetch(range(14), range(14))["codes"]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert autoencoder.decode(found).shape == (14, 1, 8, 8)
    latents, beside = autoencoder.scale_latents(), codes.latents()
    assert (beside is None) == (latents is None) == ("scale0" not in grids)
    if latents is not None and beside is not None:
        assert beside.keys() == latents.keys()
        assert all(torch.equal(beside[name], latents[name]) for name in latents)


def encode_and_tell(run: Path, out: Path) -> None:
    """What a process does, and says of itself."""
    write, content_of = CodeShardWriter.write, common.sources.content_of

    def write_and_tell(self: CodeShardWriter, number: int, *content: Any) -> None:
        print(f"wrote {number}")
        write(self, number, *content)

    def read_and_tell(file: Path) -> str:
        print(f"read {file.name}")
        return content_of(file)

    CodeShardWriter.write, common.sources.content_of = write_and_tell, read_and_tell
    encode(EncodeConfig(model=str(run), out=str(out), augment_copies=2, batch_size=3, shard_size=5))


def test_two_processes_write_what_one_writes(processes: Processes, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", data_of(save_set(tmp_path / "set")))
    encode(config(run, tmp_path / "one", augment_copies=2))
    said = processes.together(encode_and_tell, run, tmp_path / "two")
    one = files_of(tmp_path / "one")
    assert len(one) == 9  # seven shards, their index and the record of their images
    assert files_of(tmp_path / "two") == one
    for rank, text in enumerate(said):
        assert sorted(re.findall(r"wrote (\d)", text)) == [str(number) for number in range(rank, 7, 2)]

    for image in (tmp_path / "set").rglob("*.png"):
        os.utime(image, ns=(1, 1))  # as after a copy: only their bytes tell that they are the same
    said = processes.together(encode_and_tell, run, tmp_path / "two")
    assert "wrote" not in said[0] + said[1]
    assert ("read" in said[0], "read" in said[1]) == (True, False)


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        (NearestQuantizerConfig(codebook_size=16, dim=4), False),
        (FSQConfig(levels=(4, 4), dim=4), False),
        (ResidualQuantizerConfig(depth=2, layer=NearestQuantizerConfig(codebook_size=16, dim=4)), False),
        (GroupedQuantizerConfig(layer=NearestQuantizerConfig(codebook_size=16, dim=2)), False),
        (GroupedQuantizerConfig(layer=LFQConfig(bits=3, dim=2)), True),
        (LFQConfig(bits=4, dim=4), True),
        (BSQConfig(bits=4, dim=4), True),
        (BinaryQuantizerConfig(dim=4), True),
    ],
)
def test_shards_say_whether_their_codes_are_bits(quantizer: Any, expected: bool, tmp_path: Path) -> None:
    sizes = VQVAEConfig(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=quantizer)
    model = VQVAE(sizes, (8, 8))
    assert model.codes_are_bits() is expected
    train, validation = image_datasets(data_of(save_set(tmp_path / "set", 2)), seed=0)
    index = encode_images(model, train, validation, tmp_path / "codes")
    assert index.codes_are_bits is expected
    assert json.loads((tmp_path / "codes" / "index.json").read_text())["codes_are_bits"] is expected
