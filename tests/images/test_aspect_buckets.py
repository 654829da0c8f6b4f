"""Shapes for images of mixed proportions, which image gets which, and a whole small run at several shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image, ImageFile

from common.errors import UserError
from common.model_io import load_pretrained
from images.aspect_buckets import Buckets, bucket_shapes, nearest_shapes, read_sizes, shared_shapes
from images.datasets import DataConfig, ImageDataset, image_datasets, to_float
from images.files import open_upright, to_array
from images.sheets import contact_sheet, to_pil
from images.sources import ArraySource, FileSource, open_folder
from stage1_vq.autoencoders import AUTOENCODERS, VQVAEConfig
from stage1_vq.losses.adversarial import AdversarialConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.train import Stage1Config, Stage1Task, train_stage1
from tests.processes import Processes
from tests.stage1_vq.tiny import (
    DIM,
    OF_ANY_SIZE,
    QUANTIZER_ROWS,
    images_for,
    make_autoencoder,
    make_quantizer,
)
from training.data import GroupedOrder, batches_of, sample_order
from training.loop import TrainConfig
from training.previews import preview_rows

# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "stride", "count", "limit"), [(128, 16, 5, 2.0), (256, 8, 9, 2.0), (64, 4, 5, 3.0), (512, 16, 15, 4.0)]
)
def test_shapes_have_about_one_area_on_the_stride_and_spread_over_the_proportions(side, stride, count, limit):
    shapes = bucket_shapes(side * side, stride, count, limit)
    assert len(shapes) == count
    assert (side, side) in shapes
    ratios = np.log([width / height for height, width in shapes])
    assert (np.diff(ratios) > 0).all()
    assert np.abs(ratios).max() <= np.log(limit)
    assert np.abs(ratios - np.linspace(-np.log(limit), np.log(limit), count)).max() < 0.15
    for height, width in shapes:
        assert height % stride == width % stride == 0
        assert (width, height) in shapes
        # No other length of the longer side comes nearer to the area.
        assert abs(height * width - side * side) <= stride * min(height, width) / 2


def test_a_coarse_stride_leaves_fewer_shapes():
    assert bucket_shapes(32 * 32, 16, 9, 2.0) == [(32, 32)]
    assert bucket_shapes(32 * 32, 16, 9, 4.0) == [(64, 16), (32, 32), (16, 64)]
    assert bucket_shapes(5, 16, 3, 2.0) == [(16, 16)]


def test_each_image_goes_to_the_shape_of_the_nearest_proportions():
    shapes = bucket_shapes(128 * 128, 8, 7, 2.0)
    sizes = np.random.default_rng(0).integers(20, 2000, (500, 2))
    for (height, width), number in zip(sizes, nearest_shapes(sizes, shapes), strict=True):
        stretch = [max(width * h / (height * w), height * w / (width * h)) for h, w in shapes]
        assert stretch[number] == pytest.approx(min(stretch))
    assert shapes[nearest_shapes(np.zeros((1, 2)), shapes)[0]] == (128, 128)


def test_a_shape_for_too_few_images_is_given_up():
    shapes = bucket_shapes(64 * 64, 8, 5, 2.0)
    sizes = np.repeat([(120, 60), (80, 60), (60, 60), (60, 80), (60, 120)], [3, 20, 30, 20, 9], axis=0)
    assert shared_shapes(sizes, shapes, 1) == shapes
    assert shared_shapes(sizes, shapes, 9) == shapes[1:]
    assert shared_shapes(sizes, shapes, 10) == shapes[1:4]
    left = shared_shapes(sizes, shapes, 25)
    assert np.bincount(nearest_shapes(sizes, left)).min() >= 25
    assert shared_shapes(sizes, shapes, 1000) == [(64, 64)]


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """70 images of classes a and b, of mixed formats: 30 squares, 20 wide ones, and 20 tall ones, of which EXIF turns
    10; a light spot moves about in each."""
    generator = np.random.default_rng(0)
    shapes = [(24, 24)] * 30 + [(16, 32)] * 20 + [(33, 17)] * 10 + [(17, 33)] * 10
    turned = Image.Exif()
    turned[0x0112] = 6  # turn a quarter
    for number, (height, width) in enumerate(shapes):
        pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
        top, left = generator.integers(0, height - 6), generator.integers(0, width - 6)
        pixels[top : top + 6, left : left + 6] = 230
        suffix = ("png", "jpg", "bmp", "webp")[number % 4] if number < 60 else ("png", "jpg")[number % 2]
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **({"exif": turned} if number >= 60 else {}))
    return tmp_path / "photos"


def test_sizes_are_those_of_the_images_as_a_person_sees_them(photos: Path):
    (photos / "a" / "100.png").write_bytes(b"no image")
    source = open_folder(photos)
    sizes = read_sizes(source)
    assert sizes.shape == (71, 2)
    for number in range(71):
        if source.name(number) == "a/100.png":
            assert sizes[number].tolist() == [0, 0]
        else:
            image = open_upright(Path(source.location(number)), 3)
            assert sizes[number].tolist() == [image.height, image.width]
    assert (sizes == [33, 17]).all(1).sum() == 20  # the turned ones among them


def test_sizes_are_read_from_the_headers_alone(photos: Path, monkeypatch: pytest.MonkeyPatch):
    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert read_sizes(open_folder(photos)).min() > 0


def test_many_files_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("images.aspect_buckets.HEADERS", 3)
    for number in range(20):
        Image.new("L", (number + 1, 2 * number + 1)).save(tmp_path / f"{number:02d}.png")
    assert read_sizes(open_folder(tmp_path)).tolist() == [[2 * number + 1, number + 1] for number in range(20)]


def test_images_in_memory_have_one_size():
    source = ArraySource("array", np.zeros((5, 8, 12), dtype=np.uint8))
    assert read_sizes(source).tolist() == 5 * [[8, 12]]
    assert read_sizes(FileSource(Path(), np.zeros(0, dtype="S1"))).shape == (0, 2)


# ---- data sets ------------------------------------------------------------------------------------------------------


def data_config(path: Path, **changes: Any) -> DataConfig:
    defaults = {"path": str(path), "image_size": 24, "aspect_buckets": 3, "aspect_limit": 2.0}
    return DataConfig(**{**defaults, "validation_count": 20, **changes})


SHAPES = ((32, 16), (24, 24), (16, 32))  # on a stride of 8; of 512, 576 and 512 pixels


def test_each_batch_has_the_shape_of_its_group(photos: Path):
    parts = image_datasets(data_config(photos), seed=0, stride=8, batch_size=8)
    seen = [0, 0, 0]
    for part in parts:
        assert part.buckets is not None
        assert part.buckets.shapes == SHAPES
        for batch in batches_of(part, range(len(part)), 8):
            group = int(part.groups[batch[0]])
            assert part.fetch(batch, batch)["images"].shape == (len(batch), 3, *SHAPES[group])
            seen[group] += len(batch)
    assert seen == [20, 30, 20]
    train = parts[0]
    counts = np.bincount(train.groups)
    expected = ", ".join(f"{h}x{w} ({n})" for (h, w), n in zip(SHAPES, counts, strict=True))
    assert train.buckets.describe(train.indices) == expected
    assert isinstance(sample_order(train, 8, seed=0), GroupedOrder)


def test_an_image_of_a_bucket_s_own_proportions_is_whole(photos: Path):
    dataset = image_datasets(data_config(photos, validation_count=0), seed=0, stride=8, batch_size=8)[0]
    wide = [index for index in range(70) if dataset.names([index])[0].endswith((".png", ".bmp"))]
    wide = [index for index in wide if dataset.groups[index] == 2]
    for index, image in zip(wide, dataset.fetch(wide, wide)["images"].numpy(), strict=True):
        original = np.asarray(Image.open(dataset.source.location(index)))
        assert np.array_equal(image.transpose(1, 2, 0), original)


def test_images_of_several_shapes_in_one_batch_are_refused(photos: Path):
    dataset = image_datasets(data_config(photos), seed=0, stride=8, batch_size=8)[0]
    with pytest.raises(UserError, match="the images of one batch have different shapes, 32x16, 24x24, 16x32: "):
        dataset.fetch(range(50), range(50))


def test_augmentation_and_its_absence(photos: Path):
    data = data_config(photos, crop="random", flip=True, validation_count=0)
    dataset = image_datasets(data, seed=0, stride=8, batch_size=8)[0]
    tall = np.flatnonzero(dataset.groups == 0).tolist()
    assert torch.equal(dataset.fetch(tall, tall)["images"][3:5], dataset.fetch(tall[3:5], tall[3:5])["images"])
    assert not torch.equal(dataset.fetch(tall, tall)["images"], dataset.fetch(tall, range(100, 120))["images"])
    plain = dataset.without_augmentation()
    assert torch.equal(plain.fetch(tall, tall)["images"], plain.fetch(tall, range(100, 120))["images"])
    assert plain.fetch(tall, tall)["images"].shape == (20, 3, 32, 16)


def test_held_out_images_of_another_folder_take_the_shapes_of_training(photos: Path, tmp_path: Path):
    for name, size in (("a", (90, 30)), ("b", (50, 50))):
        (tmp_path / "held_out" / name).mkdir(parents=True)
        Image.new("RGB", size).save(tmp_path / "held_out" / name / "0.png")
    data = data_config(photos, validation_path=str(tmp_path / "held_out"))
    train, held_out = image_datasets(data, seed=0, stride=8, batch_size=8)
    assert train.buckets.shapes == held_out.buckets.shapes == SHAPES
    assert held_out.groups.tolist() == [2, 1]


def test_a_bad_file_is_replaced_by_an_image_of_its_own_bucket_s_shape(photos: Path, tmp_path: Path):
    broken = photos / "b" / "039.webp"  # the last of its class in the wide bucket
    sizes = read_sizes(open_folder(photos))
    source = open_folder(photos)
    number = [source.name(index) for index in range(70)].index("b/039.webp")
    broken.write_bytes(broken.read_bytes()[:60])
    buckets = Buckets(SHAPES, nearest_shapes(sizes, SHAPES))
    dataset = ImageDataset(source, data_config(photos), buckets=buckets)
    dataset.bad_images.images = 1000
    batch = dataset.fetch([number], [0])
    assert batch["images"].shape == (1, 3, 16, 32)
    assert dataset.bad_images.seen.keys() == {str(broken)}
    kept, found = dataset.fetch_readable([number], [0])
    assert (found, kept["images"].shape) == ([], (0, 3, 16, 32))


def test_an_array_has_one_bucket(tmp_path: Path):
    np.savez(tmp_path / "set.npz", images=np.zeros((40, 20, 44), dtype=np.uint8))
    parts = image_datasets(data_config(tmp_path / "set.npz"), seed=0, stride=8, batch_size=8)
    assert [part.groups.tolist() for part in parts] == [[0] * 20, [0] * 20]
    assert parts[0].fetch([0, 1], [0, 0])["images"].shape == (2, 3, 16, 32)


# ---- a run ----------------------------------------------------------------------------------------------------------

QUANTIZER = NearestQuantizerConfig(codebook_size=16, dim=4, revive_after=4, kmeans_iterations=3)
MODEL = VQVAEConfig(width=8, residual_width=8, residual_blocks=1, downsamplings=3, quantizer=QUANTIZER)


def run_config(photos: Path, **train: Any) -> Stage1Config:
    settings = {
        "steps": 12, "batch_size": 8, "learning_rate": 3e-3, "schedule": "constant", "log_every": 6,
        "validate_every": 6, "preview_every": 12, "save_every": 6, "tracker": "none", "workers": 0,
    }  # fmt: skip
    data = data_config(photos, crop="random", flip=True)
    return Stage1Config(model=MODEL, data=data, train=TrainConfig(**{**settings, **train}))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_over_mixed_photos_continues_as_if_it_had_not_been_interrupted(photos: Path, tmp_path: Path, capsys):
    config = run_config(photos)
    result = train_stage1(config, tmp_path / "whole")
    assert "training images by shape: 32x16 (" in capsys.readouterr().out
    model = load_pretrained(tmp_path / "whole", AUTOENCODERS)
    assert model.image_size == (24, 24)
    held_out = image_datasets(config.data, 0, stride=8, batch_size=8)[1]
    errors = []
    for batch in batches_of(held_out, range(20), 3):
        images = to_float(held_out.fetch(batch, batch)["images"])
        errors += (model.decode(model.encode(images)) - images).square().mean((1, 2, 3)).tolist()
    assert result.best_value == pytest.approx(np.mean(errors), rel=1e-4)

    train_stage1(run_config(photos, steps=6), tmp_path / "continued")
    train_stage1(config, tmp_path / "continued")
    other = load_pretrained(tmp_path / "continued", AUTOENCODERS)
    assert other.fingerprint() == model.fingerprint()
    assert lines(tmp_path / "whole") == lines(tmp_path / "continued")
    with Image.open(tmp_path / "whole" / "previews" / "step_00000012.png") as preview:
        cell = 4 * 32 + 8  # holds the widest and the tallest, 32 pixels, four times as large
        assert preview.height - 8 - 4 * cell in (0, 2 * (14 + 8))  # with the names of classes


@pytest.mark.parametrize("run", [".", "runs/one"])
def test_a_run_inside_the_folder_of_its_images_is_refused(photos: Path, run: str):
    before = sorted(photos.rglob("*"))
    for data in (data_config(photos), data_config(photos / "a", validation_path=str(photos))):
        with pytest.raises(UserError, match=r"lies in the folder of the images, .*photos, where its previews would be"):
            train_stage1(replace(run_config(photos), data=data), photos / run)
    assert sorted(photos.rglob("*")) == before


def test_the_preview_shows_each_image_at_its_own_shape_above_its_reconstruction(photos: Path, monkeypatch):
    config = run_config(photos)
    held_out = image_datasets(config.data, 0, stride=8, batch_size=8)[1]
    torch.manual_seed(0)
    task = Stage1Task(AUTOENCODERS["vqvae"](MODEL, (24, 24)), held_out, 4)
    task.model.eval()
    seen: list[list[list[Image.Image]]] = []

    def sheet(rows, names, titles, legible):
        seen.append(rows)
        return contact_sheet(rows, names, titles, legible)

    monkeypatch.setattr("stage1_vq.train.contact_sheet", sheet)
    task.preview(task.model)
    (rows,) = seen
    for number, row in enumerate(preview_rows(held_out.labels)):
        for column, index in enumerate(row):
            images = to_float(held_out.fetch([index], [index])["images"])
            reconstruction = task.model.decode(task.model.encode(images))[0]
            shown, decoded = rows[2 * number][column], rows[2 * number + 1][column]
            assert shown.size == decoded.size == (images.shape[3], images.shape[2])
            assert shown.tobytes() == to_pil(images[0]).tobytes()
            assert abs(to_array(decoded).astype(int) - to_array(to_pil(reconstruction))).max() <= 1


@pytest.mark.parametrize("row", OF_ANY_SIZE)
def test_every_autoencoder_trains_at_shapes_that_change_from_step_to_step(row):
    autoencoder = make_autoencoder(row)
    s = autoencoder.stride
    for step, (rows, columns) in enumerate([(2, 4), (3, 3), (4, 2), (1, 5), (2, 4)]):
        images = images_for(autoencoder, 3, seed=step, size=(rows * s, columns * s))
        output = autoencoder(images)
        assert output.reconstruction.shape == images.shape
        loss = sum(output.losses.values())
        loss.backward()
        assert loss.isfinite()
        autoencoder.update()
        for name, value in autoencoder.health(steps_per_epoch=2).items():
            assert value.isfinite(), name


@pytest.mark.parametrize("row", QUANTIZER_ROWS)
def test_every_quantizer_trains_at_grids_that_change_from_step_to_step(row):
    quantizer = make_quantizer(row)
    generator = torch.Generator().manual_seed(0)
    quantizer.initialise([torch.randn(3, DIM, 2, 4, generator=generator)])
    for h, w in [(2, 4), (3, 3), (4, 2), (1, 5), (2, 4)]:
        z = torch.randn(3, DIM, h, w, generator=generator)
        quantized = quantizer(z)
        assert quantized.z_q.shape == (3, quantizer.dim_out, h, w)
        for codes, grid in zip(quantized.codes, quantizer.grids(h, w), strict=True):
            assert codes.shape == (3, grid.height, grid.width)
        quantizer.update()
        for name, value in quantizer.health(steps_per_epoch=2).items():
            assert value.isfinite(), name


@pytest.mark.slow
def test_two_processes_train_what_one_does(processes: Processes, photos: Path, tmp_path: Path):
    config = run_config(photos, accumulate=2, steps=4)  # sums of another order grow in more
    train_stage1(config, tmp_path / "one")
    processes.together(train_stage1, config, tmp_path / "two")
    one, two = (load_pretrained(tmp_path / name, AUTOENCODERS).state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=3e-5, msg=name)


def test_buckets_off_leave_everything_as_it_was(photos: Path):
    config = replace(run_config(photos), data=data_config(photos, aspect_buckets=0))
    train, held_out = image_datasets(config.data, 0, stride=8, batch_size=8)
    assert train.groups is held_out.groups is train.buckets is None
    assert train.fetch(range(50), range(50))["images"].shape == (50, 3, 24, 24)
    assert "aspect_buckets" not in config.resolved()["data"]  # so that a run from before there were any continues
    assert run_config(photos).resolved()["data"]["aspect_buckets"] == 3


def test_a_discriminator_must_suit_the_smallest_sides_of_all_shapes(photos: Path, tmp_path: Path):
    config = replace(run_config(photos), adversarial=AdversarialConfig(weight=0.5))  # three layers, enough for 24x24
    with pytest.raises(UserError, match=r"layers=3 leaves nothing of 16x16 images: give at most 2"):
        train_stage1(config, tmp_path / "run")
