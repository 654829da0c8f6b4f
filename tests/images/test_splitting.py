"""Held-out images and known labels: which they are, and that nothing but their own settings chooses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from images.datasets import (
    ImageDataset,
    image_datasets,
)
from images.splitting import split_indices
from tests.images.numbered import config, save_folder


@pytest.mark.parametrize("labels", [None, np.repeat(np.arange(10), 50)])  # sorted by class, as MNIST's sample is
def test_split_is_disjoint_complete_and_reproducible(labels: np.ndarray | None) -> None:
    train, held_out = split_indices(500, labels, 60, seed=3)
    assert len(held_out) == 60
    assert sorted([*train, *held_out]) == list(range(500))
    again = split_indices(500, labels, 60, seed=3)
    assert np.array_equal(train, again[0])
    assert np.array_equal(held_out, again[1])
    other = split_indices(500, labels, 60, seed=4)[1]
    assert len(set(held_out) & set(other)) < 30
    if labels is not None:
        assert np.bincount(labels[held_out]).tolist() == [6] * 10


def test_split_takes_of_unequal_classes_their_share() -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    held_out = split_indices(1000, labels, 100, seed=0)[1]
    assert np.bincount(labels[held_out]).tolist() == [90, 9, 1]
    assert split_indices(5, None, 0, seed=0)[0].tolist() == [0, 1, 2, 3, 4]


def test_held_out_images_are_the_same_for_every_training_seed(tmp_path: Path) -> None:
    data = config(path=str(save_folder(tmp_path, 50)), validation_share=0.1)
    (train, held_out), (other_train, other_held_out) = image_datasets(data, 0), image_datasets(data, 1)
    assert len(held_out) == 10
    names = held_out.names(range(10))
    assert names == other_held_out.names(range(10))
    assert not set(names) & set(train.names(range(90)))
    assert train.fingerprint() == other_train.fingerprint() != held_out.fingerprint()


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"validation_share": 0.0}, 0),
        ({"validation_share": 0.001}, 1),
        ({"validation_share": 0.25}, 5),
        ({"validation_share": 0.25, "validation_count": 2}, 2),
        ({"validation_count": 0}, 0),
    ],
)
def test_how_many_are_held_out(tmp_path: Path, changes: dict[str, Any], count: int) -> None:
    data = config(path=str(save_folder(tmp_path, 10)), **changes)
    assert [len(part) for part in image_datasets(data, 0)] == [20 - count, count]


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    data = config(path=str(save_folder(tmp_path, 2)), validation_count=4)
    with pytest.raises(UserError, match="holds 4 images, of which 4 would be held out: none is left to train on"):
        image_datasets(data, 0)


def test_a_validation_folder_shares_the_class_numbers(tmp_path: Path) -> None:
    train, test = save_folder(tmp_path / "train", 3), tmp_path / "test"
    for name in ("b", "c"):
        Image.new("L", (8, 8)).save(train / "b" / f"{name}.png")
        save_folder(test, 2)
    (train / "0").mkdir()
    Image.new("L", (8, 8)).save(train / "0" / "x.png")  # "0" comes before "a", and only in train
    data = config(path=str(train), validation_path=str(test))
    train_set, test_set = image_datasets(data, 0)
    assert train_set.class_names == test_set.class_names == ("0", "a", "b")
    assert [len(train_set), len(test_set)] == [9, 4]
    assert test_set.fetch(range(4), range(4))["labels"].tolist() == [1, 1, 2, 2]
    (test / "zebra").mkdir()
    Image.new("L", (8, 8)).save(test / "zebra" / "x.png")
    with pytest.raises(UserError, match=r"has classes that .*train has not: zebra"):
        image_datasets(data, 0)


def test_a_validation_folder_without_classes(tmp_path: Path) -> None:
    train, flat = save_folder(tmp_path / "train", 3), tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (8, 8)).save(flat / "x.png")
    with pytest.raises(UserError, match=r"has classes and .*flat has none: .*into subfolders such as a"):
        image_datasets(config(path=str(train), validation_path=str(flat)), 0)
    parts = image_datasets(config(path=str(flat), validation_path=str(train)), 0)
    assert [part.class_names for part in parts] == [None, None]
    assert parts[1].fetch([0], [0])["labels"].tolist() == [-1]


def partly(folder: Path, **changes: Any) -> tuple[ImageDataset, ImageDataset]:
    return image_datasets(config(path=str(folder), labels_per_class=3, validation_count=4, **changes), seed=0)


def test_so_many_labels_of_each_class_are_kept_and_all_of_the_held_out_ones(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, per_class=10)
    train, held_out = partly(folder)
    assert np.bincount(train.labels + 1).tolist() == [10, 3, 3]
    assert sorted(held_out.labels.tolist()) == [0, 0, 1, 1]
    whole, _ = image_datasets(config(path=str(folder), validation_count=4), seed=0)
    known = train.labels >= 0
    assert (train.labels[known] == whole.labels[known]).all()
    assert train.fetch([0, 1, 2], [0, 1, 2])["labels"].tolist() == train.labels[:3].tolist()


def test_which_labels_are_kept_goes_by_their_seed_alone(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, per_class=10)
    first, _ = partly(folder)
    again, _ = image_datasets(config(path=str(folder), labels_per_class=3, validation_count=4), seed=7)
    other, _ = partly(folder, labels_seed=1)
    assert (again.labels == first.labels).all()
    assert (other.labels != first.labels).any()


def test_more_labels_than_there_are_are_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, per_class=4)
    with pytest.raises(UserError, match=r"data.labels_per_class=3, but .* has 2 training images of class 0: lower it"):
        partly(folder)


def test_classes_of_held_out_images_may_be_unknown_too(tmp_path: Path) -> None:
    train, held_out = save_folder(tmp_path / "train", per_class=2), save_folder(tmp_path / "held_out", per_class=1)
    (held_out / "a").rename(held_out / "unlabelled")
    Image.new("L", (8, 8)).save(train / "a" / "more.png")
    with pytest.raises(UserError, match="has none: sort the held-out images alike"):
        image_datasets(config(path=str(train), validation_path=str(held_out)), seed=0)
    save_folder(held_out, per_class=1)
    _, images = image_datasets(config(path=str(train), validation_path=str(held_out)), seed=0)
    assert images.labels.tolist() == [0, 1, -1]
