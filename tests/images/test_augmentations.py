"""Crops, flips and shifts: every place alike, by seed and draw alone, and never of held-out images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from images.datasets import (
    ImageDataset,
    image_datasets,
    uniforms,
)
from tests.images.numbered import config, numbered, save_folder


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
