from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.model_io import load_pretrained
from images.datasets import DataConfig, image_datasets, to_float
from stage1_vae.binarise import NumberedImages
from stage1_vae.labels.m2 import M2, M2Config
from stage1_vae.labels.task import SemiSupervisedTask
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import ELBOConfig, SemiSupervisedConfig, TrainingFacts, build_objective
from stage1_vae.objectives.semi_supervised import SemiSupervised
from stage1_vae.objectives.terms import Terms
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAEConfig
from training.config import TrainConfig
from training.data import sample_order

# ---- the loss of all images, by batches of a mixture ----------------------------------------------------------------


class Known(nn.Module):
    """Of image i, a number in place of an image: a bound of -i^2 and log q(y|x) of -i."""

    def forward(self, images: Tensor, draws: int, noise: Tensor | None, labels: Tensor) -> Terms:
        zero = torch.zeros(1, len(images), 1)
        return Terms((zero,), -images[None].square(), (zero,), (-images[None, :, None],), (zero[0],))


class Numbers:
    """training.task.Dataset of numbers, of which every fifth has a label."""

    def __init__(self, objective: SemiSupervised) -> None:
        self.mixture = objective.mixture

    def __len__(self) -> int:
        return len(LABELS)


LABELS = np.where(np.arange(60) % 5 == 0, 1, -1)


def objective_of(labels: np.ndarray, batch_size: int, **changes: float) -> SemiSupervised:
    facts = TrainingFacts(len(labels), 10, (1,), (), labels=labels, batch_size=batch_size)
    made = build_objective(SemiSupervisedConfig(**changes), facts)
    assert isinstance(made, SemiSupervised)
    return made


def losses(objective: SemiSupervised, indices: list[int], labels_of_all: np.ndarray = LABELS) -> float:
    images, labels = torch.tensor(indices, dtype=torch.float64), torch.from_numpy(labels_of_all[indices])
    return float(objective.loss(Known(), images, 0, None, labels).loss)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_batches_of_any_mixture_estimate_the_loss_of_all_images(share: float):
    """Over steps in which every image of a kind is seen as often as the others of it, to float32's rounding."""
    images, known = torch.arange(60, dtype=torch.float64), torch.from_numpy(LABELS >= 0)
    expected = images.square().mean() + 0.3 * images[known].mean()
    objective = objective_of(LABELS, 16, labelled_share=share, alpha=0.3)
    order = sample_order(Numbers(objective), 16, seed=0)
    found = [losses(objective, [i for i, _ in order.samples(range(16 * s, 16 * s + 16))]) for s in range(48)]
    assert np.mean(found) == pytest.approx(float(expected), rel=1e-6)
    assert np.std(found) > 1


def test_parts_of_a_batch_are_the_batch():
    objective = objective_of(LABELS, 16, labelled_share=0.3)
    indices = [i for i, _ in sample_order(Numbers(objective), 16, seed=0).samples(range(16))]
    parts = [losses(objective, indices[start : start + 4]) for start in range(0, 16, 4)]
    assert np.mean(parts) == pytest.approx(losses(objective, indices), rel=1e-12)


def test_where_all_images_have_a_label_batches_are_uniform_and_the_loss_is_of_all():
    every, images = np.ones(60, dtype=np.int64), torch.arange(60, dtype=torch.float64)
    plain = objective_of(every, 60, alpha=0.0)
    assert plain.mixture is None
    assert losses(plain, list(range(60)), every) == pytest.approx(float(images.square().mean()))


def test_images_without_any_label_are_refused():
    with pytest.raises(UserError, match="the training images have no classes, expected some in folders of classes"):
        objective_of(np.full(8, -1), 4)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight-pixel images of two kinds: a bright half left or right, of grey values that differ."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 80, (80, 8, 8), dtype=np.uint8)
    labels = np.arange(80) % 2
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 4] += 150
    path = tmp_path_factory.mktemp("images") / "halves.npz"
    np.savez(path, images=pixels[..., None], labels=labels, class_names=np.array(["left", "right"]))
    return path


def config(images: Path, **train: object) -> Stage1VAEConfig:
    network = DenseConfig(hidden=(16,))
    settings = {"steps": 6, "batch_size": 16, "learning_rate": 3e-3, "workers": 0, "tracker": "none", **train}
    return Stage1VAEConfig(
        model=M2Config(classes=2, latents=2, classifier=network, encoder=network, decoder=network),
        objective=SemiSupervisedConfig(labelled_share=0.25),
        data=DataConfig(path=str(images), image_size=8, channels=1, validation_count=20, labels_per_class=2),
        train=TrainConfig(**{"save_every": 3, "validate_every": 3, "preview_every": 0, **settings}),
        binarised="once",
    )


def test_a_run_tells_the_classes_of_images_of_which_four_said_theirs(images: Path, tmp_path: Path):
    result = train_vae(config(images, steps=70, validate_every=70, preview_every=70, learning_rate=1e-2), tmp_path)
    expected = {"negative_elbo", "log_likelihood", "kl", "bits_per_dimension", "psnr", "accuracy"}
    assert set(result.metrics) == expected
    assert result.metrics["accuracy"] == 1
    model = load_pretrained(tmp_path / "model", {"m2": M2})
    assert model.class_names == ("left", "right")
    latents = model.draw_latents(100, torch.Generator().manual_seed(0))
    left, right = (model.decode(model.in_class(latents, torch.full((100,), label))).mean((0, 1, 2)) for label in (0, 1))
    more_to_the_left = (left - right).detach()  # 8 columns: of the same styles in one class and in the other
    assert more_to_the_left[:4].mean() > 0.3
    assert more_to_the_left[4:].mean() < -0.3
    assert len(list((tmp_path / "previews").glob("*.png"))) == 1


def test_micro_batches_are_one_batch(images: Path, tmp_path: Path):
    """Of the same noise, labelled and unlabelled images spread over them: the weights agree to rounding."""
    for name, accumulate in (("whole", 1), ("parts", 4)):
        train_vae(config(images, accumulate=accumulate, steps=3), tmp_path / name)
    whole, parts = (load_pretrained(tmp_path / name / "model", {"m2": M2}).state_dict() for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-4)


def test_accuracy_is_of_the_held_out_images_that_have_a_label(images: Path):
    chosen = config(images)
    _, held_out = image_datasets(chosen.data, seed=0)
    held_out.labels = np.where(np.arange(20) < 7, held_out.labels, -1)
    torch.manual_seed(0)
    model, data = M2(chosen.model, (8, 8)).eval(), NumberedImages(held_out, "once", 0, training=False)
    objective = objective_of(np.array([0, 1]), 4)
    task = SemiSupervisedTask(model, objective, data, batch_size=4)
    batches = [data.fetch(batch, batch) for batch in (range(12), range(12, 20))]
    with torch.no_grad():
        found = torch.cat([task.validate(model, batch)["accuracy"] for batch in batches])
        said = model.class_log_probabilities(to_float(batches[0]["images"])).argmax(1).numpy()
    right = (said[:7] == held_out.labels[:7]).mean()
    assert 0 < right < 1
    assert float(found.mean()) == pytest.approx(right)


def test_settings_that_do_not_fit_are_refused(images: Path, tmp_path: Path):
    plain = config(images)
    with pytest.raises(UserError, match=r"model\.kind=m2 with objective\.kind=elbo, expected either m2"):
        replace(plain, objective=ELBOConfig())
    with pytest.raises(UserError, match=r"model\.kind=vae with objective\.kind=semi_supervised, expected"):
        replace(plain, model=VAEConfig())
    with pytest.raises(UserError, match=r"data\.labels_per_class=2 with model\.kind=vae, which looks at no labels"):
        replace(plain, model=VAEConfig(), objective=ELBOConfig())
    with pytest.raises(UserError, match=r"model\.classes=3, but the images have 2 classes, left, right"):
        train_vae(replace(plain, model=replace(plain.model, classes=3)), tmp_path)
