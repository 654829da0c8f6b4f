"""Configs from recipes, and what a training refuses before its first step: as the command line, from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from codes.shards import CodeShardWriter
from common.errors import UserError
from pipelines.options import read_recipe
from pipelines.trainings import read_config, train_stage1, train_stage2, train_vae
from stage1_vae.train import Stage1VAEConfig
from stage1_vq.train import Stage1Config
from stage2_prior.train import Stage2Config
from stage2_prior.train_latents import Stage2LatentConfig
from tests.pipelines.conftest import make_autoencoder


def test_a_config_is_that_of_the_command_line():
    changes = {
        "train.steps": 7, "train.betas": (0.5, 0.6), "train.precision": "no", "data.path": Path("my digits"),
        "data.flip": True, "data.validation_count": None, "model.quantizer.kind": "fsq",
    }  # fmt: skip
    config = read_config(Stage1Config, "mnist_quickstart", changes)
    words = [
        "--train.steps", "7", "--train.betas", "[0.5, 0.6]", "--train.precision", "no", "--data.path", "my digits",
        "--data.flip", "true", "--data.validation_count", "null", "--model.quantizer.kind", "fsq",
    ]  # fmt: skip
    assert config == read_recipe("train-stage1", Stage1Config, "stage1", ["--config", "mnist_quickstart", *words])[0]
    assert (config.train.steps, config.train.betas, config.data.validation_count) == (7, (0.5, 0.6), None)
    assert (config.data.path, config.data.flip, config.model.quantizer.kind) == ("my digits", True, "fsq")
    assert read_config(Stage1VAEConfig, "mnist_binary").model.kind == "vae"
    assert read_config(Stage2Config, "mnist_maskgit").model.kind == "maskgit"
    assert read_config(Stage2LatentConfig, "mnist_latents_maf").model.kind == "masked_autoregressive_flow"


def test_a_recipe_can_be_a_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  path: photos\ntrain:\n  steps: 3\n")
    assert read_config(Stage1Config, path).train.steps == 3


@pytest.mark.parametrize(
    ("config_class", "recipe", "changes", "said"),
    [
        (Stage1Config, "mnist_quickstart", {"train.step": 3}, "train.steps"),
        (Stage1Config, "mnist_quickstart", {"train.steps": 0}, "expected at least 1"),
        (Stage1Config, "mnist_quickstart", {"train.steps": "many"}, "train.steps"),
        (Stage1Config, "mnist_maskgit", {}, "is a recipe of stage two"),
        (Stage2Config, "no_such", {}, "there is no recipe no_such"),
    ],
)
def test_mistakes_are_told_as_on_the_command_line(config_class, recipe: str, changes: dict, said: str):
    with pytest.raises(UserError, match=said):
        read_config(config_class, recipe, changes)


def test_a_training_refuses_what_its_command_refuses(tmp_path: Path):
    run = tmp_path / "run"
    for train, config in (
        (train_stage1, read_config(Stage1Config, "folder", {"data.path": ""})),
        (train_vae, read_config(Stage1VAEConfig, "folder", {"data.path": ""})),
    ):
        with pytest.raises(UserError, match=r"data\.path is empty"):
            train(config, run)
    autoencoder = make_autoencoder()
    CodeShardWriter(tmp_path / "codes", autoencoder.code_spec(), []).finish()
    for config, said in (
        (
            read_config(Stage2Config, "mnist_quickstart"),
            "codes is empty: expected a folder that `zellige encode` wrote; give",
        ),
        (read_config(Stage2LatentConfig, "mnist_latents_maf"), "codes is empty: .* wrote of a VAE"),
        (
            read_config(Stage2LatentConfig, "mnist_latents_maf", {"codes": str(tmp_path / "codes")}),
            "expected latent shards",
        ),
        (
            read_config(Stage2Config, "mnist_quickstart", {"codes": str(tmp_path / "codes")}),
            "holds no codes of training",
        ),
    ):
        with pytest.raises(UserError, match=said):
            train_stage2(config, run, device="cpu")
    assert not run.exists()
