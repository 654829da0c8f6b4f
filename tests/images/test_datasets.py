"""Datasets of images: exactly the pixels that the config asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from images.datasets import (
    DataConfig,
    ImageDataset,
    image_datasets,
    to_float,
    to_uint8,
)
from images.sources import ArraySource
from tests.images.numbered import config, numbered, save_folder
from training.data import Loader


def test_uint8_to_float_and_back_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert floats[0] == -1
    assert floats[255] == 1
    assert torch.equal(to_uint8(floats), values)
    assert torch.equal(to_uint8(floats.double()), values)
    outside = to_uint8(torch.tensor([-7.0, 7.0, -1.003, 0.0, 0.0039]))
    assert outside.tolist() == [0, 255, 0, 128, 128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "data.image_size=0, expected at least 1 pixel"),
        ({"image_size": (8, 8, 3)}, "data.image_size=(8, 8, 3), expected one number, or height and width"),
        ({"aspect_buckets": 4}, "data.aspect_buckets=4, expected 0, which is off, or an odd number from 3 on"),
        ({"aspect_buckets": -3}, "data.aspect_buckets=-3, expected 0, which is off, or an odd number from 3 on"),
        ({"aspect_limit": 1.0}, "data.aspect_limit=1.0, expected above 1"),
        ({"aspect_limit": float("nan")}, "data.aspect_limit=nan, expected above 1"),
        ({"channels": 4}, "data.channels=4, expected 1 (grey) or 3 (RGB)"),
        ({"shift": 8}, "data.shift=8, expected 0 or more, less than the shorter side"),
        ({"validation_share": 1.0}, "data.validation_share=1.0, expected 0 or more, less than 1"),
        ({"validation_count": -1}, "data.validation_count=-1, expected 0 or more images"),
    ],
)
def test_a_bad_config_is_refused_when_it_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config(**changes)


def test_image_size_is_one_number_or_two() -> None:
    assert (config(image_size=8).height, config(image_size=8).width) == (8, 8)
    oblong = config(image_size=[4, 6])  # as YAML gives it
    assert (oblong.height, oblong.width) == (4, 6)
    assert oblong == config(image_size=(4, 6))


def test_an_exact_batch() -> None:
    source = numbered(5, 6, 9)
    batch = ImageDataset(source, config(image_size=(6, 9))).fetch([3, 0], [0, 1])
    assert batch["images"].dtype == torch.uint8
    assert np.array_equal(batch["images"].numpy()[:, 0], source.images[[3, 0], :, :, 0])
    assert batch["labels"].tolist() == [-1, -1]
    colour = ImageDataset(source, config(image_size=(6, 9), channels=3)).fetch([3], [0])["images"]
    assert np.array_equal(colour[0].numpy(), np.repeat(source.images[3].transpose(2, 0, 1), 3, axis=0))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    data = config(path=str(save_folder(tmp_path, 20, (12, 10))), crop="random", flip=True, shift=1)
    dataset, _ = image_datasets(data, seed=0)
    requests = [[(index, index + 100) for index in range(start, start + 8)] for start in range(0, 32, 8)]
    loader = Loader(dataset, requests, workers=workers, prefetch=2, device=torch.device("cpu"))
    for request, batch in zip(requests, loader, strict=True):
        expected = dataset.fetch(*zip(*request, strict=True))
        assert torch.equal(batch["images"], expected["images"])
        assert torch.equal(batch["labels"], expected["labels"])


def test_a_folder_as_cifar_10_comes(tmp_path: Path) -> None:
    """train|test/class/0000.jpg: train is named, test is held out."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("airplane", "automobile", "bird"):
            (tmp_path / "cifar10" / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "cifar10" / part / name / f"{number:04d}.jpg")
    data = DataConfig(
        path=str(tmp_path / "cifar10" / "train"),
        validation_path=str(tmp_path / "cifar10" / "test"),
        image_size=32,
    )
    train, held_out = image_datasets(data, 0)
    assert train.class_names == held_out.class_names == ("airplane", "automobile", "bird")
    batch = held_out.fetch([0, 5, 11], [0, 0, 0])
    assert batch["images"].shape == (3, 3, 32, 32)
    assert batch["labels"].tolist() == [0, 1, 2]
    assert held_out.names([5]) == ["automobile/0001.jpg"]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_are_the_same_at_once_as_one_by_one(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is neither scaled nor augmented is taken as one array; its pixels, labels and layout are those of the
    loop over images."""
    pixels = np.random.default_rng(0).integers(256, size=(20, 6, 8, channels), dtype=np.uint8)
    source = ArraySource("noise", pixels, labels=np.arange(20) % 3)
    data = ImageDataset(source, config(image_size=(6, 8), channels=channels), indices=np.arange(19, -1, -1))
    indices = [3, 3, 0, 19, 7]
    read: list[int] = []
    one_by_one = ImageDataset.read

    def counted(self: ImageDataset, index: int, *how: Any) -> np.ndarray | None:
        read.append(index)
        return one_by_one(self, index, *how)

    monkeypatch.setattr(ImageDataset, "read", counted)
    found = data.fetch(indices, indices)
    readable, of_these = data.fetch_readable(indices, indices)
    assert (read, of_these) == ([], indices)
    assert torch.equal(found["images"], readable["images"])
    assert torch.equal(found["labels"], readable["labels"])
    monkeypatch.setattr(ImageDataset, "as_they_are", lambda self, indices, shape: None)
    expected, _ = data.fetch_readable(indices, indices)
    assert read == indices
    monkeypatch.undo()
    for name in ("images", "labels"):
        assert torch.equal(found[name], expected[name])
        assert found[name].dtype == expected[name].dtype
        assert found[name].is_contiguous()
    found["images"].zero_()  # a copy, never the source's own
    assert (pixels != 0).any()
    assert torch.equal(data.fetch(indices, indices)["images"], expected["images"])
    assert len(data.fetch([], [])["images"]) == 0


@pytest.mark.parametrize(
    ("changes", "augment_seed"), [({"image_size": 4}, None), ({"channels": 3}, None), ({"flip": True}, 0)]
)
def test_images_that_are_changed_are_read_one_by_one(changes: dict[str, Any], augment_seed: int | None) -> None:
    data = ImageDataset(numbered(4), config(**changes), augment_seed=augment_seed)
    assert data.as_they_are([0, 1], data.shape_of([0, 1])) is None
