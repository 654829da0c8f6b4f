"""What a training asks of every objective."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from images.datasets import DataConfig
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import OBJECTIVES
from stage1_vae.objectives.adversarial import DiscriminatorConfig
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAEConfig
from training.config import TrainConfig

SMALL = DenseConfig(hidden=(16,))
Settings = dict[str, Any]
SETTINGS: dict[str, list[Settings]] = {  # of each kind, those whose computation differs
    "elbo": [
        {"draws": 2, "annealing": "cyclical", "free_nats": 0.1, "generator_prior_variance": 1.0},
        {"capacity": 5.0},
    ],
    "balanced": [{"draws": 2}],
    "importance": [
        {"draws": 3, "estimates": 2, "elbo_share": 0.5},
        {"draws": 3, "estimates": 2, "generator_over_all": True, "gradient": "doubly_reparameterised"},
    ],
    "info": [{"alpha": 0.5}, {"deterministic": True, "kernel": "rbf"}],
    "autoencoder": [{}],
    "adversarial": [{}, {"deterministic": True}],
    "beta_tc": [{}, {"sampling": "weighted"}],
    "factor": [{"discriminator": DiscriminatorConfig(network=SMALL)}],
    "hamiltonian": [{"learned": True}, {"learned": False}],
    "aggressive": [{"inference_steps": 1}],
}
CASES = [(kind, settings) for kind, several in SETTINGS.items() for settings in several]


def test_the_table_names_every_objective():
    of_other_models = {
        "balanced",
        "semi_supervised",
        "subsampled",
        "mixture_bound",
    }  # whose runs have tests of their own
    assert SETTINGS.keys() | of_other_models == OBJECTIVES.keys()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 80, (60, 8, 8, 1), dtype=np.uint8)
    pixels[::2, :, :4] += 150
    path = tmp_path_factory.mktemp("images") / "halves.npz"
    np.savez(path, images=pixels)
    return path


def train(images: Path, run: Path, kind: str, settings: dict[str, Any], **train: Any) -> None:
    plain = {"batch_size": 12, "learning_rate": 3e-3, "workers": 0, "tracker": "none", "preview_every": 0}
    train_vae(
        Stage1VAEConfig(
            model=VAEConfig(latents=2, encoder=SMALL, decoder=SMALL),
            data=DataConfig(path=str(images), image_size=8, channels=1, validation_count=12),
            train=TrainConfig(**{"steps": 6, "save_every": 3, "validate_every": 3, "log_every": 1, **plain, **train}),
            objective=OBJECTIVES[kind][1](**settings),
            binarised="once",
        ),
        run,
    )


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == "train"]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_a_run_of_each_objective_continues_bit_for_bit(
    images: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
):
    train(images, tmp_path / "whole", kind, settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")
    shutil.rmtree(tmp_path / "cut" / "model")
    train(images, tmp_path / "cut", kind, settings)
    whole, cut = (tmp_path / run / "checkpoints" / "step_00000006" for run in ("whole", "cut"))
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in cut.iterdir())
    assert [name for name in names if (whole / name).read_bytes() != (cut / name).read_bytes()] == []
    losses = [line["loss"] for line in lines(tmp_path / "whole")]
    assert np.isfinite(losses).all()
    assert all(line["skipped_steps"] == 0 for line in lines(tmp_path / "whole"))


@pytest.mark.parametrize("kind", ["adversarial", "factor", "hamiltonian"])
def test_networks_beside_the_model_learn_and_are_saved(images: Path, tmp_path: Path, kind: str):
    train(images, tmp_path / "run", kind, SETTINGS[kind][0])
    name = "leapfrog" if kind == "hamiltonian" else "discriminator"
    saved = tmp_path / "run" / "checkpoints"
    first, last = (saved / f"step_0000000{step}" / f"{name}.safetensors" for step in (3, 6))
    assert first.read_bytes() != last.read_bytes()
    assert all(line[f"{name}_grad_norm"] > 0 for line in lines(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["importance", "hamiltonian", "elbo"])
def test_micro_batches_are_taken(images: Path, tmp_path: Path, kind: str):
    train(images, tmp_path / "run", kind, SETTINGS[kind][-1], accumulate=3)
    assert len(lines(tmp_path / "run")) == 6
