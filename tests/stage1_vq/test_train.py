"""The stage-one task by itself, and a whole small run of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image

from common.errors import UserError
from common.model_io import load_pretrained
from images.datasets import DataConfig, image_datasets, to_float
from images.run_facts import fingerprint_of
from images.sheets import contact_sheet, to_pil
from metrics.similarity import psnr
from stage1_vq.autoencoders import AUTOENCODERS, VQVAE, VQVAE2Config, VQVAEConfig
from stage1_vq.losses.perceptual import LPIPSConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.quantizers.usage import CodeUsage
from stage1_vq.train import Stage1Config, Stage1Task, fingerprints, train_stage1
from tests.processes import Processes
from tests.stage1_vq.tiny import assert_equal_states
from tests.training.runs import metrics, newest_weights
from training.loop import TrainConfig

QUANTIZER = NearestQuantizerConfig(codebook_size=16, dim=4, revive_after=4, kmeans_iterations=3)
MODEL = VQVAEConfig(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=QUANTIZER)
TWO_LEVELS = VQVAE2Config(
    channels=1, bottom_stride=2, width=8, residual_width=8, residual_blocks=1, quantizer=QUANTIZER
)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npz of 60 images of 8x8 pixels: a bright square somewhere on a dark ground."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 60, (60, 8, 8), dtype=np.uint8)
    for image in images:
        top, left = generator.integers(0, 5, 2)
        image[top : top + 4, left : left + 4] = 230
    path = tmp_path_factory.mktemp("squares") / "squares.npz"
    np.savez(path, images=images)
    return str(path)


def make_config(path: str, **train: Any) -> Stage1Config:
    settings = {
        "steps": 12, "batch_size": 12, "learning_rate": 3e-3, "log_every": 4, "validate_every": 6,
        "preview_every": 0, "save_every": 6, "tracker": "none", "workers": 0,
    }  # fmt: skip
    data = DataConfig(path=path, image_size=8, channels=1, validation_count=20)
    return Stage1Config(model=MODEL, data=data, train=TrainConfig(**{**settings, **train}))


def make_task(path: str, steps_per_epoch: int = 4) -> Stage1Task:
    torch.manual_seed(0)
    config = make_config(path)
    return Stage1Task(VQVAE(MODEL, (8, 8)), image_datasets(config.data, seed=0)[1], steps_per_epoch)


def first_batch(task: Stage1Task, count: int = 6) -> dict[str, Any]:
    return task.validation_data.fetch(range(count), range(count))


# ---- the task -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_the_named_losses(squares):
    task = make_task(squares)
    loss, metrics, companion_losses, _ = task.step(task.model, first_batch(task), 0)
    assert set(metrics) == {"reconstruction_loss", "commitment_loss", "quantization_error"}
    torch.testing.assert_close(loss, metrics["reconstruction_loss"] + metrics["commitment_loss"])
    assert loss.requires_grad
    assert companion_losses == {}
    assert not any(value.requires_grad for value in metrics.values())


def test_the_start_puts_the_codebook_among_the_first_latents(squares):
    task, other = make_task(squares), make_task(squares)
    batches = [first_batch(task, 6), first_batch(task, 12)]  # two micro-batches
    images = [to_float(batch["images"]) for batch in batches]
    torch.manual_seed(1)
    task.start(task.model, batches)
    torch.manual_seed(1)
    other.model.initialise(images)
    codebook = task.model.quantizer.codebook
    assert torch.equal(codebook, other.model.quantizer.codebook)
    latents = task.model.latents(images[1])
    assert latents.amin() <= codebook.min() <= codebook.max() <= latents.amax()


def test_after_a_step_the_codebook_has_moved_and_after_a_skipped_one_it_has_not(squares):
    task, other = make_task(squares), make_task(squares)
    before = task.model.quantizer.codebook.clone()
    task.step(task.model, first_batch(task, 12), 0)
    task.discard_step()
    assert torch.equal(task.model.quantizer.codebook, before)
    for one in (task, other):
        one.step(one.model, first_batch(one), 0)
        one.after_step(0)
    assert not torch.equal(task.model.quantizer.codebook, before)
    assert torch.equal(task.model.quantizer.codebook, other.model.quantizer.codebook)
    assert set(task.health()) == {"perplexity", "codes_used_share", "dead_codes", "revived_codes"}


def test_validation_gives_the_error_of_each_clamped_reconstruction(squares):
    task = make_task(squares)
    model, batch = task.model.eval(), first_batch(task)
    metrics = task.validate(model, batch)
    images = to_float(batch["images"])
    expected = (model.decode(model.encode(images)) - images).square().mean((1, 2, 3))
    torch.testing.assert_close(metrics["mse"], expected)
    torch.testing.assert_close(metrics["psnr"], 10 * torch.log10(2**2 / expected))
    assert task.best_metric in metrics


def test_psnr_of_known_errors():
    errors = torch.tensor([4.0, 0.04, 0.0])
    torch.testing.assert_close(psnr(errors), torch.tensor([0.0, 20.0, 100.0]))


@pytest.fixture
def sheets(monkeypatch) -> list[tuple[Any, ...]]:
    """What was laid out on sheets: pictures, names of the rows, titles of the pictures."""
    seen: list[tuple[Any, ...]] = []

    def sheet(rows, names, titles, legible):
        seen.append((rows, names, titles))
        return contact_sheet(rows, names, titles, legible)

    monkeypatch.setattr("stage1_vq.train.contact_sheet", sheet)
    return seen


def test_the_preview_shows_held_out_images_each_row_above_its_reconstructions(squares, sheets):
    task = make_task(squares)
    picture = task.preview(task.model.eval())
    ((rows, names, titles),) = sheets
    assert names == ["real", "decoded", "real", "decoded"]
    assert titles == [[], [], [], []]  # these images have no classes
    everywhere = [i * len(task.validation_data) // 16 for i in range(16)]
    images = to_float(task.validation_data.fetch(everywhere, everywhere)["images"])
    reconstructions = task.model.decode(task.model.encode(images))
    for number in range(16):
        row, column = number // 8 * 2, number % 8
        assert rows[row][column].tobytes() == to_pil(images[number]).tobytes()
        assert rows[row + 1][column].tobytes() == to_pil(reconstructions[number]).tobytes()
    assert picture.shape[0] == 3
    assert picture.shape[1] == 28 + 4 * (112 + 28)  # 8x8 pixels are magnified to 112x112


def test_the_preview_shows_all_classes_by_name(tmp_path, sheets):
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "named.npz", images=images, labels=labels, class_names=["ash", "birch", "cedar"])
    task = make_task(str(tmp_path / "named.npz"))
    task.preview(task.model.eval())
    ((rows, _, titles),) = sheets
    assert titles == [["ash", "ash", "birch", "birch", "cedar", "cedar"], []] * 2
    shown = [image.tobytes() for row in rows[::2] for image in row]
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert [known[pixels] for pixels in shown] == [0, 0, 1, 1, 2, 2] * 2
    assert len(set(shown)) == 12


@pytest.mark.parametrize(("count", "shape"), [(0, None), (3, [3, 3]), (11, [8, 8, 3, 3])])
def test_the_preview_of_few_held_out_images(squares, count, shape, sheets):
    task = make_task(squares)
    config = replace(make_config(squares).data, validation_count=count)
    task.validation_data = image_datasets(config, seed=0)[1]
    picture = task.preview(task.model.eval())
    assert (picture is None) == (shape is None)
    assert [[len(row) for row in rows] for rows, *_ in sheets] == ([] if shape is None else [shape])


def test_the_warning_about_unused_codes_reaches_the_log(squares):
    task = make_task(squares, steps_per_epoch=1)
    task.step(task.model, first_batch(task), 0)
    task.after_step(0)
    (warning,) = task.warnings({"codes_used_share": 0.1})
    assert "only 10% of 16 codes were used in the last epoch" in warning
    assert task.warnings({"codes_used_share": 0.9}) == []
    assert task.warnings({}) == []  # after a skipped step there is no health to speak of


# ---- a run ----------------------------------------------------------------------------------------------------------


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_a_model_that_can_be_loaded(squares, tmp_path):
    config = make_config(squares, steps=200, log_every=20, validate_every=50, save_every=100, preview_every=100)
    result = train_stage1(config, tmp_path / "run")
    assert result.finished
    model = load_pretrained(tmp_path / "run", AUTOENCODERS)
    images = to_float(image_datasets(config.data, seed=0)[1].fetch(range(20), range(20))["images"])
    error = (model.decode(model.encode(images)) - images).square().mean().detach()
    assert error < 0.5 * images.var(correction=0)
    torch.testing.assert_close(float(error), result.best_value, rtol=1e-4, atol=0)
    named = {name for line in lines(tmp_path / "run") for name in line}
    assert {"perplexity", "codes_used_share", "dead_codes", "mse", "psnr", "reconstruction_loss"} <= named
    assert list((tmp_path / "run" / "previews").iterdir())


def test_an_interrupted_run_continues_as_if_it_had_not_been(squares, tmp_path):
    config = make_config(squares, schedule="constant", log_every=6)  # so that a shorter run is its first half
    train_stage1(config, tmp_path / "whole")
    train_stage1(replace(config, train=replace(config.train, steps=6)), tmp_path / "continued")
    train_stage1(config, tmp_path / "continued")
    one, other = (load_pretrained(tmp_path / name, AUTOENCODERS) for name in ("whole", "continued"))
    assert one.fingerprint() == other.fingerprint()
    assert lines(tmp_path / "whole") == lines(tmp_path / "continued")


def test_figures_of_codes_are_computed_for_log_lines_alone_and_change_no_weights(squares, tmp_path, monkeypatch):
    plain, asked = CodeUsage.health, []

    def counted(usage: CodeUsage, steps_per_epoch: int) -> dict[str, torch.Tensor]:
        asked.append(int(usage.steps))
        return plain(usage, steps_per_epoch)

    monkeypatch.setattr(CodeUsage, "health", counted)
    for name, every in (("often", 1), ("seldom", 5)):
        train_stage1(make_config(squares, log_every=every), tmp_path / name)
    assert asked == [*range(1, 13), 5, 10, 12]
    assert_equal_states(newest_weights(tmp_path / "often"), newest_weights(tmp_path / "seldom"))
    often, seldom = (metrics(tmp_path / name, "train") for name in ("often", "seldom"))
    health = ("perplexity", "codes_used_share", "dead_codes", "revived_codes")
    for line in seldom:  # of the last step, not of all since the line before
        assert [line[name] for name in health] == [often[line["step"] - 1][name] for name in health]


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, TWO_LEVELS], ids=["vqvae", "vqvae2"])
def test_two_processes_train_what_one_does(processes: Processes, squares, tmp_path, model):
    judged = {"evaluate_every": 6, "evaluate_features": "tests.pipelines.feature_networks:pooled"}
    config = replace(make_config(squares, accumulate=2, log_every=1, **judged), model=model)
    train_stage1(config, tmp_path / "one")
    assert sum("rfd" in line for line in lines(tmp_path / "one")) == 2
    processes.together(train_stage1, config, tmp_path / "two")
    one, two = (load_pretrained(tmp_path / name, AUTOENCODERS).state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for line, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert not isinstance(value, float) or math.isclose(value, other[name], rel_tol=1e-3), name


def test_images_that_cannot_be_read_are_told_at_the_end_and_when_known_at_the_start(tmp_path, capsys):
    save_photos(tmp_path / "photos", 40)
    (tmp_path / "photos" / "a" / "bad.png").write_bytes(b"no image")
    config = make_config(str(tmp_path / "photos"), steps=5, batch_size=10, workers=1)
    line = f"1 of 41 images cannot be read and is passed over: see {tmp_path}/run/bad_files.txt"
    train_stage1(config, tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    assert (said.count(line), said[-1]) == (1, line)
    train_stage1(replace(config, train=replace(config.train, steps=6)), tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    assert (said.count(line), said[0], said[-1]) == (2, line, line)
    shutil.copytree(tmp_path / "photos", tmp_path / "scratch")
    moved = replace(config, data=replace(config.data, path=str(tmp_path / "scratch")))
    train_stage1(replace(moved, train=replace(config.train, steps=11)), tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    assert (said.count(line), said[-1]) == (1, line)
    assert (tmp_path / "run" / "bad_files.txt").read_text().startswith(f"{tmp_path}/scratch/a/bad.png\t")


# ---- what a run remembers of its data -------------------------------------------------------------------------------


def save_photos(folder: Path, count: int = 12) -> None:
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[number % 2] / f"{number}.png")


def fingerprint_of_folder(folder: Path, **changes: Any) -> str:
    data = DataConfig(path=str(folder), image_size=8, channels=1, **{"validation_count": 4, **changes})
    return fingerprint_of(image_datasets(data, seed=0)[0])


def test_images_are_known_in_another_place_and_not_for_others_in_the_same(tmp_path):
    save_photos(tmp_path / "photos")
    before = fingerprint_of_folder(tmp_path / "photos")
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert fingerprint_of_folder(tmp_path / "moved") == before
    assert fingerprint_of_folder(tmp_path / "moved", validation_seed=1) != before
    for change in (
        lambda root: (root / "a" / "0.png").rename(root / "b" / "0.png"),  # another class
        lambda root: (root / "a" / "0.png").rename(root / "a" / "00.png"),
        lambda root: (root / "a" / "0.png").unlink(),
        lambda root: [Image.open(file).resize((4, 4)).save(file) for file in root.rglob("*.png")],
    ):
        shutil.copytree(tmp_path / "moved", tmp_path / "other")
        change(tmp_path / "other")
        assert fingerprint_of_folder(tmp_path / "other") != before
        shutil.rmtree(tmp_path / "other")


def test_of_many_files_some_are_asked_for_their_size(tmp_path, monkeypatch):
    save_photos(tmp_path / "photos", 40)
    asked = []
    stat = Path.stat
    monkeypatch.setattr("images.run_facts.SIZES", 6)
    monkeypatch.setattr(Path, "stat", lambda path, **options: [asked.append(path), stat(path, **options)][1])
    first = fingerprint_of_folder(tmp_path / "photos")
    assert len({path for path in asked if path.suffix == ".png"}) == 6
    assert fingerprint_of_folder(tmp_path / "photos") == first


def test_the_weights_of_a_loss_are_known_by_their_content(squares, tmp_path):
    config = make_config(squares)
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    datasets = image_datasets(config.data, seed=0)
    off, on = (LPIPSConfig(weight=weight, weights=str(tmp_path / "vgg.pth")) for weight in (0, 1))
    assert set(fingerprints(replace(config, perceptual=off), *datasets)) == {"data.path"}
    found = fingerprints(replace(config, perceptual=on), *datasets)
    assert found["perceptual.weights"] == hashlib.sha256(b"weights").hexdigest()


# ---- what a user can get wrong --------------------------------------------------------------------------------------


def test_channels_that_differ_are_refused(squares):
    config = make_config(squares)
    with pytest.raises(UserError, match=r"model.channels=3 and data.channels=1 differ"):
        replace(config, model=replace(MODEL, channels=3))


def test_an_image_size_off_the_stride_is_refused(squares):
    config = make_config(squares)
    with pytest.raises(UserError, match=r"data.image_size=30x32 does not fit a model whose codes stand for 4x4 pixels"):
        replace(config, data=replace(config.data, image_size=(30, 32)))
