from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.model_io import load_pretrained
from images.datasets import DataConfig, ImageDataset, image_datasets, to_float
from images.sources import ArraySource
from stage1_vae.binarise import Binarised, NumberedImages
from stage1_vae.decoders import PixelCNNDecoderConfig
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import ELBOConfig, ImportanceConfig, TrainingFacts, build_objective
from stage1_vae.objectives.terms import elbo
from stage1_vae.priors import VampPriorConfig
from stage1_vae.task import VAETask, noise_of
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE, VAEConfig
from tests.processes import Processes
from training.config import TrainConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight-pixel images of two kinds: a bright half left or right, of grey values that differ."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 80, (60, 8, 8), dtype=np.uint8)
    labels = np.arange(60) % 2
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 4] += 150
    path = tmp_path_factory.mktemp("images") / "halves.npz"
    np.savez(path, images=pixels[..., None], labels=labels)
    return path


def config(images: Path, **train: object) -> Stage1VAEConfig:
    settings = {"steps": 8, "batch_size": 12, "learning_rate": 3e-3, "workers": 0, "tracker": "none", **train}
    return Stage1VAEConfig(
        model=VAEConfig(latents=2, encoder=DenseConfig(hidden=(16,)), decoder=DenseConfig(hidden=(16,))),
        data=DataConfig(path=str(images), image_size=8, channels=1, validation_count=12),
        train=TrainConfig(**{"save_every": 4, "validate_every": 4, "preview_every": 0, **settings}),
        binarised="once",
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(run / "model", {"vae": VAE}).state_dict()


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_learns_and_leaves_a_model_and_a_preview(images: Path, tmp_path: Path):
    result = train_vae(config(images, steps=120, validate_every=60, preview_every=120, learning_rate=1e-2), tmp_path)
    # 64 pixels, half of them nearly always black: far below the 64 ln 2 = 44.4 nats of knowing nothing
    assert result.best_value is not None
    assert result.best_value < 37
    assert set(result.metrics) == {"negative_elbo", "log_likelihood", "kl", "bits_per_dimension", "psnr"}
    assert len(list((tmp_path / "previews").glob("*.png"))) == 1
    assert load_pretrained(tmp_path / "model", {"vae": VAE}).binarised == Binarised("once", 0)


def test_validations_draw_no_images_of_a_decoder_without_a_mean(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pixel by pixel it would take many times as long as all else, for the PSNR of a draw."""
    plain = config(images)
    decoder = PixelCNNDecoderConfig(layers=1, width=2, output_width=2, features=1, network=DenseConfig(hidden=()))
    monkeypatch.setattr(VAE, "decode", lambda *_: pytest.fail("an image was drawn"))
    result = train_vae(replace(plain, model=replace(plain.model, decoder=decoder)), tmp_path)
    assert set(result.metrics) == {"negative_elbo", "log_likelihood", "kl", "bits_per_dimension"}


def test_a_run_goes_on_as_it_would_have(images: Path, tmp_path: Path):
    """The first four steps alone, then the rest: the weights of eight at once, bit for bit."""
    train_vae(config(images), tmp_path / "whole")
    train_vae(config(images), tmp_path / "parts")
    for path in (tmp_path / "parts" / "checkpoints").iterdir():
        if "8" in path.name:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "parts" / "model")
    train_vae(config(images), tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("objective", [ELBOConfig(draws=3), ImportanceConfig(draws=4)])
def test_micro_batches_are_one_batch(images: Path, tmp_path: Path, objective):
    """Of the same noise: the weights agree to rounding."""
    for name, accumulate in (("whole", 1), ("parts", 3)):
        chosen = replace(config(images, steps=4, accumulate=accumulate), objective=objective)
        train_vae(chosen, tmp_path / name)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_what_one_does(processes: Processes, images: Path, tmp_path: Path):
    settings = config(images, accumulate=2, steps=6)
    train_vae(settings, tmp_path / "one")
    processes.together(train_vae, settings, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_rmsprop_trains_and_continues(images: Path, tmp_path: Path):
    train_vae(config(images, optimizer="rmsprop"), tmp_path / "rmsprop")
    train_vae(config(images), tmp_path / "adam")
    assert not torch.equal(
        weights(tmp_path / "rmsprop")["decoder.network.layers.layers.0.weight"],
        weights(tmp_path / "adam")["decoder.network.layers.layers.0.weight"],
    )


@pytest.mark.parametrize("binarised", ["threshold", "once", "anew"])
def test_binarised_images_are_black_and_white(images: Path, binarised):
    train, _ = image_datasets(config(images).data, 0)
    data = NumberedImages(train, binarised, training=True)
    batch = data.fetch([0, 1, 2], [5, 6, 7])["images"]
    assert set(batch.unique().tolist()) == {0, 255}
    again = data.fetch([0, 1, 2], [8, 9, 10])["images"]
    assert torch.equal(batch, again) == (binarised != "anew")
    grey = train.fetch([0, 1, 2], [0, 1, 2])["images"]
    if binarised == "threshold":
        assert torch.equal(batch == 255, grey >= 128)


def test_images_that_can_be_read_are_binarised_as_ever(images: Path):
    mirrored = replace(config(images).data, flip=True)  # else images in memory are taken at once, and none is missing
    train, _ = image_datasets(mirrored, 0)
    data = NumberedImages(train, "anew", training=True)
    whole = data.fetch([2, 0, 1], [5, 6, 7])
    train.unreadable.add(0)
    batch, found = data.fetch_readable([2, 0, 1], [5, 6, 7])
    assert found == [2, 1]
    assert torch.equal(batch["images"], whole["images"][[0, 2]])
    assert torch.equal(batch["numbers"], whole["numbers"][[0, 2]])
    train.unreadable.update((1, 2))
    assert data.fetch_readable([2, 0, 1], [5, 6, 7])[1] == []


def test_an_image_in_the_place_of_an_unreadable_one_is_drawn_as_itself(images: Path):
    mirrored = replace(config(images).data, flip=True)  # else images in memory are taken at once, and none is missing
    train, _ = image_datasets(mirrored, 0)
    data = NumberedImages(train, "once", training=True)
    expected = data.fetch([2], [0])
    train.unreadable.add(1)
    found = data.fetch([1], [0])  # 2 takes its place
    assert torch.equal(found["numbers"], expected["numbers"])
    assert torch.equal(found["images"], expected["images"])


@pytest.mark.parametrize("moves", [{"flip": True}, {"shift": 2}, {"crop": "random", "flip": True}], ids=str)
def test_an_image_drawn_once_is_the_same_wherever_it_moves(moves: dict[str, Any]):
    """Each pixel is of a grey of its own, and is always black, or always white."""
    pictures = (60 + np.arange(8 * 12)).reshape(1, 8, 12).astype(np.uint8)
    settings = DataConfig(path="x", image_size=8, channels=1, **moves)
    images = ImageDataset(ArraySource("x", pictures), settings, augment_seed=0)
    once = NumberedImages(images, "once", training=True)
    found: dict[int, set[int]] = {}
    for draw in range(30):
        grey, drawn = (data.fetch([0], [draw])["images"].flatten().tolist() for data in (images, once))
        for value, white in zip(grey, drawn, strict=True):
            found.setdefault(value, set()).add(white)
    assert len(found) >= 64
    assert {len(values) for values in found.values()} == {1}
    assert set().union(*found.values()) == {0, 255}


def test_binarisation_draws_white_as_often_as_the_grey_value_says(images: Path):
    train, held_out = image_datasets(config(images).data, 0)
    grey = train.fetch([3], [0])["images"][0].double() / 255
    data = NumberedImages(train, "anew", training=True)
    drawn = torch.stack([data.fetch([3], [draw])["images"][0].double() / 255 for draw in range(2000)])
    error = (grey * (1 - grey) / 2000).sqrt()
    assert ((drawn.mean(0) - grey).abs() <= 5 * error + 1e-9).all()
    seen = NumberedImages(held_out, "anew", training=False)
    assert torch.equal(seen.fetch([1], [1])["images"], seen.fetch([1], [99])["images"])


def test_the_same_image_is_drawn_the_same_wherever_it_stands(images: Path):
    """Held out or not, in whatever place of a part: drawn once means once."""
    train, held_out = image_datasets(config(images).data, 0)
    everything, _ = image_datasets(DataConfig(path=str(images), image_size=8, channels=1, validation_share=0), 0)
    whole = NumberedImages(everything, "once", training=True)
    for part in (train, held_out):
        number = int(part.indices[4])
        own = NumberedImages(part, "once", training=True).fetch([4], [0])
        assert own["numbers"].tolist() == [number]
        assert torch.equal(own["images"], whole.fetch([number], [0])["images"])


def test_validation_does_not_depend_on_the_batch(images: Path):
    torch.manual_seed(0)
    model = VAE(config(images).model, (8, 8)).eval()
    _, held_out = image_datasets(config(images).data, 0)
    data = NumberedImages(held_out, "once", training=False)
    objective = build_objective(ELBOConfig(), TrainingFacts(48, 8, model.shape, tuple(model.generator_parameters())))
    task = VAETask(model, objective, data, batch_size=12)
    with torch.no_grad():
        whole = task.validate(model, data.fetch(range(12), range(12)))
        parts = [task.validate(model, data.fetch([i], [i])) for i in range(12)]
    for name, values in whole.items():
        torch.testing.assert_close(values, torch.cat([part[name] for part in parts]), rtol=1e-5, atol=1e-4)


def test_noise_is_that_of_the_posterior(images: Path):
    torch.manual_seed(0)
    model = VAE(config(images).model, (8, 8))
    batch = to_float(torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8))
    noise = noise_of(model, batch, range(3), draws=4000)
    assert noise.shape == (4000, 3, 2)
    assert (noise.mean(0).abs() < 0.07).all()
    assert len(noise[0].unique()) == 6
    assert torch.isfinite(elbo(model(batch, noise=noise))).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": VAEConfig(channels=3)}, "model.channels=3 and data.channels=1 differ"),
        ({"data": DataConfig(path="x", channels=1, aspect_buckets=3)}, "data.aspect_buckets=3, expected 0"),
        ({"binarised_seed": -1}, "binarised_seed=-1, expected 0 or more"),
    ],
)
def test_configs_that_cannot_be_are_refused(values, message):
    given = {"model": VAEConfig(), "data": DataConfig(path="x", channels=1), "train": TrainConfig(), **values}
    with pytest.raises(UserError, match=message):
        Stage1VAEConfig(**given)


def test_a_run_of_another_stage_is_refused(images: Path, tmp_path: Path):
    (tmp_path / "run.json").write_text('{"stage": "stage one"}')
    with pytest.raises(UserError, match=r"is a run of stage one, and this is stage one \(VAE\)"):
        train_vae(config(images), tmp_path)


def test_grey_images_under_a_likelihood_of_binary_ones_are_told(images: Path, tmp_path: Path, capsys):
    result = train_vae(replace(config(images, steps=1), binarised="none"), tmp_path)
    assert "note: a likelihood of black and white is trained on grey images" in capsys.readouterr().out
    assert "bits_per_dimension" not in result.metrics


def test_pseudo_inputs_start_from_images_of_the_whole_training_set(images: Path, tmp_path: Path):
    of_vamp = replace(config(images).model, prior=VampPriorConfig(components=8))
    settings = replace(config(images, steps=1, validate_every=1, save_every=1, learning_rate=1e-9), model=of_vamp)
    train_vae(settings, tmp_path / "vamp")
    started = load_pretrained(tmp_path / "vamp" / "model", {"vae": VAE}).prior.pseudo_inputs
    data = NumberedImages(image_datasets(settings.data, 0)[0], "once", 0, training=True)
    chosen = [i * len(data) // 8 for i in range(8)]
    torch.testing.assert_close(started, to_float(data.fetch(chosen, chosen)["images"]), atol=1e-4, rtol=0)


def test_a_run_begins_with_all_weights_of_a_vae_of_its_kind(images: Path, tmp_path: Path, capsys):
    train_vae(config(images), tmp_path / "first")
    start = replace(config(images, steps=1, learning_rate=1e-12), start_from=str(tmp_path / "first"))
    train_vae(replace(start, frozen=("decoder",)), tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-7)
    assert f"{len(first)} tensors kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="frozen=encode: the model has no such part"):
        train_vae(replace(config(images), frozen=("encode",)), tmp_path / "third")
