"""Datasets of images: the split, the draws, bad files, and exactly the pixels that the config asks for."""

from __future__ import annotations

import re
from contextlib import closing
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
    uniforms,
)
from images.sources import ArraySource
from images.splitting import split_indices
from training.data import Loader


def numbered(count: int, height: int = 8, width: int = 8) -> ArraySource:
    """Grey images of which every pixel differs from its neighbours and tells its image."""
    images = np.arange(height * width, dtype=np.int64).reshape(1, height, width) * 3
    return ArraySource("numbered", ((images + 7 * np.arange(count)[:, None, None]) % 251).astype(np.uint8))


def save_folder(root: Path, per_class: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Classes a and b; image i of a class has the grey value i."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            Image.new("L", size, number).save(root / name / f"{number:03d}.png")
    return root


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"path": "somewhere", "image_size": 8, "channels": 1, **changes})


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


def test_an_exact_batch() -> None:
    source = numbered(5, 6, 9)
    batch = ImageDataset(source, config(image_size=(6, 9))).fetch([3, 0], [0, 1])
    assert batch["images"].dtype == torch.uint8
    assert np.array_equal(batch["images"].numpy()[:, 0], source.images[[3, 0], :, :, 0])
    assert batch["labels"].tolist() == [-1, -1]
    colour = ImageDataset(source, config(image_size=(6, 9), channels=3)).fetch([3], [0])["images"]
    assert np.array_equal(colour[0].numpy(), np.repeat(source.images[3].transpose(2, 0, 1), 3, axis=0))


def test_center_crop_of_wide_and_tall_images(tmp_path: Path) -> None:
    picture = np.arange(20 * 60, dtype=np.int64).reshape(20, 60) % 251
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(picture.T.astype(np.uint8)).save(tmp_path / "tall.png")
    data = config(path=str(tmp_path), image_size=20, validation_share=0.0)
    tall, wide = image_datasets(data, 0)[0].fetch([0, 1], [0, 0])["images"][:, 0].numpy()
    assert np.array_equal(wide, picture[:, 20:40])
    assert np.array_equal(tall, picture.T[20:40])


def places(dataset: ImageDataset, draws: range) -> np.ndarray:
    """Images that `draws` make of image 0: b H W."""
    return dataset.fetch([0] * len(draws), draws)["images"][:, 0].numpy()


def test_random_crops_are_all_windows_alike() -> None:
    source = numbered(1, 8, 12)
    dataset = ImageDataset(source, config(crop="random"), augment_seed=0)
    windows = [source.images[0, :, left : left + 8, 0] for left in range(5)]
    seen = np.array([[np.array_equal(crop, window) for window in windows] for crop in places(dataset, range(1000))])
    assert (seen.sum(1) == 1).all()
    assert (abs(seen.sum(0) - 200) < 60).all()  # five standard deviations


def test_flip_mirrors_every_second_draw_or_so() -> None:
    source = numbered(1)
    original = source.images[0, :, :, 0]
    crops = places(ImageDataset(source, config(flip=True), augment_seed=0), range(1000))
    mirrored = (crops == original[:, ::-1]).all((1, 2))
    assert ((crops == original).all((1, 2)) != mirrored).all()
    assert abs(mirrored.sum() - 500) < 80


def test_shift_moves_each_way_and_repeats_the_border() -> None:
    source = numbered(1)
    padded = np.pad(source.images[0, :, :, 0], 2, mode="edge")
    windows = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    crops = places(ImageDataset(source, config(shift=2), augment_seed=0), range(2000))
    seen = np.array([[np.array_equal(crop, window) for window in windows] for crop in crops])
    assert (seen.sum(1) == 1).all()
    assert (abs(seen.sum(0) - 80) < 45).all()


def test_augmentation_depends_on_seed_and_draw_alone() -> None:
    source = numbered(30, 12, 16)
    data = config(crop="random", flip=True, shift=1)
    dataset = ImageDataset(source, data, augment_seed=5)
    order = np.random.default_rng(0).permutation(30).tolist()
    together = dataset.fetch(range(30), range(100, 130))["images"]
    apart = [ImageDataset(source, data, augment_seed=5).fetch([i], [100 + i])["images"] for i in order]
    assert torch.equal(together[order], torch.cat(apart))
    assert not torch.equal(together, dataset.fetch(range(30), range(130, 160))["images"])
    assert not torch.equal(
        together, ImageDataset(source, data, augment_seed=6).fetch(range(30), range(100, 130))["images"]
    )
    plain = dataset.without_augmentation()
    assert torch.equal(plain.fetch(range(30), range(30))["images"], plain.fetch(range(30), range(30, 60))["images"])


def test_held_out_images_are_never_augmented(tmp_path: Path) -> None:
    data = config(
        path=str(save_folder(tmp_path, 20, (12, 10))), crop="random", flip=True, shift=3, validation_share=0.5
    )
    train, held_out = image_datasets(data, seed=0)
    assert train.augment_seed == 0
    assert held_out.augment_seed is None


def test_uniforms_are_uniform_and_unlike() -> None:
    numbers = uniforms(0, range(20_000), 5)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] - 10_000).max() < 500  # five standard deviations
    assert np.abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 0.03
    assert np.abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.03
    assert np.abs(np.corrcoef(numbers[:, 0], uniforms(1, range(20_000), 5)[:, 0])[0, 1]) < 0.03
    far = uniforms(2**40, [2**50, 2**50 + 1], 5)
    assert len(np.unique(far)) == 10


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


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_replaced_named_and_counted(tmp_path: Path, workers: int) -> None:
    root, record = save_folder(tmp_path / "set", 100), tmp_path / "run" / "bad_files.txt"
    spoil(root / "a" / "010.png")
    dataset, _ = image_datasets(config(path=str(root), validation_share=0.0), 0, bad_files=record)
    requests = [[(index, index) for index in range(start, start + 10)] for start in (0, 10, 5, 10)]
    loader = Loader(dataset, requests, workers=workers, prefetch=2, device=torch.device("cpu"))
    batches = [batch["images"][:, 0, 0, 0].tolist() for batch in loader]
    assert batches[1] == [11, *range(11, 20)]  # the next good image in its place
    assert batches[2] == [*range(5, 10), 11, *range(11, 15)]
    assert batches[3] == batches[1]
    (line,) = set(record.read_text().splitlines())  # two workers that find it at one instant both name it
    location, reason = line.split("\t")
    assert location == str(root / "a" / "010.png")
    assert reason


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("options", "allowed"), [({}, 5), ({"max_bad_share": 0.035}, 7), ({"max_bad_share": 0.0}, 0)])
def test_more_bad_files_than_may_be_stop_with_the_list(
    tmp_path: Path, workers: int, options: dict[str, Any], allowed: int
) -> None:
    root, record = save_folder(tmp_path / "set", 100), tmp_path / "bad_files.txt"
    spoilt = [root / "a" / f"{number:03d}.png" for number in range(10, 10 + allowed)] + [root / "b" / "099.png"]
    for path in spoilt:
        spoil(path)
    data = config(path=str(root), validation_share=0.0, **options)
    dataset, _ = image_datasets(data, 0, bad_files=record)
    requests = [[(index, index) for index in range(start, start + 10)] for start in range(0, 200, 10)]
    loader = Loader(dataset, requests, workers=workers, prefetch=2, device=torch.device("cpu"))
    with closing(loader):  # as `caught` would keep its workers alive
        for _ in range(19):
            next(loader)
        found = dataset.bad_images.summary()
        assert workers or found == (
            f"{allowed} of 200 images cannot be read and are passed over: see {record}" if allowed else ""
        )
        with pytest.raises(
            UserError, match=f"{allowed + 1} of 200 images cannot be .*, and {allowed} may be"
        ) as caught:
            next(loader)
    assert str(spoilt[0]) in str(caught.value)
    for path in spoilt:
        assert str(path) in record.read_text()


def test_the_last_image_is_replaced_by_the_first(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 100)
    spoil(root / "b" / "099.png")
    dataset, _ = image_datasets(config(path=str(root), validation_share=0.0), 0)
    batch = dataset.fetch([198, 199], [0, 1])
    assert batch["images"][:, 0, 0, 0].tolist() == [98, 0]
    assert batch["labels"].tolist() == [1, 0]  # of the image that is shown


def test_a_part_without_one_readable_image_does_not_search_for_ever(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 100)
    data = config(path=str(root), validation_count=2)
    held_out = image_datasets(data, 0)[1]
    for name in held_out.names([0, 1]):
        spoil(root / name)
    with pytest.raises(UserError, match=r"none of the 2 images in this part of .* can be read"):
        held_out.fetch([0], [0])


def test_a_bad_file_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = save_folder(tmp_path, 100)
    spoil(root / "a" / "010.png")
    dataset, _ = image_datasets(config(path=str(root), validation_share=0.0), 0)
    tried: list[int] = []
    read = dataset.source.read
    monkeypatch.setattr(dataset.source, "read", lambda index, *rest: (tried.append(index), read(index, *rest))[1])
    for draw in range(3):
        dataset.fetch([10], [draw])
    assert tried == [10, 11, 11, 11]


def test_leaving_out_what_cannot_be_read(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 100)
    spoil(root / "a" / "001.png")
    data = config(path=str(root), validation_share=0.0, crop="random", flip=True)
    dataset, _ = image_datasets(data, 0)
    batch, found = dataset.fetch_readable([0, 1, 2], [7, 8, 9])
    assert found == [0, 2]
    assert torch.equal(batch["images"], dataset.fetch([0, 2], [7, 9])["images"])
    nothing, found = dataset.fetch_readable([1], [0])
    assert found == []
    assert nothing["images"].shape == (0, 1, 8, 8)


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
