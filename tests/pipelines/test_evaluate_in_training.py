"""`train.evaluate_every`: distances in the log of a run, which they do not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from images.datasets import DataConfig, image_datasets, to_float, to_uint8
from metrics.features import open_features
from metrics.in_training import OfReconstructions, in_order
from pipelines.cli import main
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAEConfig
from stage1_vq.autoencoders import VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.train import Stage1Config, train_stage1
from tests.pipelines.conftest import make_autoencoder
from tests.pipelines.feature_networks import frechet_by_scipy
from training.loop import TrainConfig

POOLED = "tests.pipelines.feature_networks:pooled"
TRAIN: dict[str, Any] = {
    "steps": 6, "batch_size": 12, "log_every": 3, "validate_every": 3, "preview_every": 0, "save_every": 3,
    "tracker": "none", "workers": 0, "schedule": "constant", "evaluate_every": 3, "evaluate_features": POOLED,
}  # fmt: skip
DECODER = """
model: {kind: vqvae, channels: 1, width: 8, residual_width: 8, quantizer: {codebook_size: 16, dim: 4}}
data: {image_size: 16, channels: 1, validation_count: 12}
train: {steps: 2, batch_size: 12, validate_every: 0, preview_every: 0, workers: 0, tracker: none}
"""
PRIOR = """
model: {kind: transformer, layers: 1, width: 16, heads: 2}
train: {steps: 4, batch_size: 12, log_every: 1, validate_every: 0, preview_every: 0, workers: 0, tracker: none}
"""


def config_of(digits: Path, **train: Any) -> Stage1Config:
    model = VQVAEConfig(
        channels=1, width=8, residual_width=8, residual_blocks=1,
        quantizer=NearestQuantizerConfig(codebook_size=16, dim=4),
    )  # fmt: skip
    data = DataConfig(path=str(digits), image_size=16, channels=1, validation_count=20)
    return Stage1Config(model=model, data=data, train=TrainConfig(**{**TRAIN, **train}))


def lines(run: Path, *splits: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] in splits]


def test_the_distance_is_that_of_files_of_held_out_images_and_their_reconstructions(digits: Path):
    model, data = make_autoencoder(), image_datasets(config_of(digits).data, seed=0)[1]
    network = open_features(POOLED)
    found = OfReconstructions(network, data, images=15)(model)
    chosen = [i * 20 // 15 for i in range(15)]
    images = data.fetch(chosen, chosen)["images"]
    decoded = to_uint8(model.decode(model.encode(to_float(images))))
    assert found == {"rfd": pytest.approx(frechet_by_scipy(network(images), network(decoded)), rel=1e-6)}


def test_a_run_of_stage_one_logs_it_and_learns_the_same(digits: Path, tmp_path: Path, capsys):
    config = config_of(digits)
    train_stage1(config, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "note: evaluations are FDs of 20 held-out images, in 4 features of " + POOLED in said
    train_stage1(replace(config, train=replace(config.train, steps=3)), tmp_path / "parts")
    train_stage1(config, tmp_path / "parts")
    train_stage1(replace(config, train=replace(config.train, evaluate_every=0)), tmp_path / "without")
    whole, parts, without = (tmp_path / name for name in ("whole", "parts", "without"))
    evaluations = lines(whole, "evaluation")
    assert [line["step"] for line in evaluations] == [3, 6]
    assert len({line["rfd"] for line in evaluations}) == 2
    assert lines(whole, "train", "validation", "evaluation") == lines(parts, "train", "validation", "evaluation")
    assert lines(whole, "train", "validation") == lines(without, "train", "validation")
    assert (whole / "model" / "model.safetensors").read_bytes() == (
        without / "model" / "model.safetensors"
    ).read_bytes()


def test_a_run_of_a_vae_logs_it_and_learns_the_same(digits: Path, tmp_path: Path):
    network = DenseConfig(hidden=(8,))
    model = VAEConfig(latents=2, encoder=network, decoder=network)
    data = DataConfig(path=str(digits), image_size=16, channels=1, validation_count=20)
    config = Stage1VAEConfig(model=model, data=data, train=TrainConfig(**TRAIN), binarised="threshold")
    train_vae(config, tmp_path / "with")
    train_vae(replace(config, train=replace(config.train, evaluate_every=0)), tmp_path / "without")
    assert [line["step"] for line in lines(tmp_path / "with", "evaluation")] == [3, 6]
    assert all(line["rfd"] > 0 for line in lines(tmp_path / "with", "evaluation"))
    assert lines(tmp_path / "with", "train", "validation") == lines(tmp_path / "without", "train", "validation")


def test_a_run_of_stage_two_judges_samples_as_images(digits: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("decoder.yaml").write_text(DECODER)
    Path("prior.yaml").write_text(PRIOR)
    assert main(["train-stage1", "--config", "decoder.yaml", "--data.path", str(digits), "--run", "decoder"]) == 0
    encode = ["encode", "--model", "decoder", "--data.path", str(digits), "--data.validation_share", "0.2"]
    assert main([*encode, "--out", "codes"]) == 0
    train = ["train-stage2", "--config", "prior.yaml", "--codes", "codes", "--train.evaluate_features", POOLED]
    judged = ["--train.evaluate_every", "2", "--decoder", "decoder"]
    assert main([*train, *judged, "--run", "with"]) == 0
    assert main([*train, "--decoder", "decoder", "--run", "without"]) == 0
    found = lines(Path("with"), "evaluation")
    assert [line["step"] for line in found] == [2, 4]
    assert all(line["fd_to_decoded"] > 0 for line in found)
    assert lines(Path("with"), "train") == lines(Path("without"), "train")
    assert "12 held-out images" in capsys.readouterr().out
    assert main([*train, "--train.evaluate_every", "2", "--run", "third"]) == 2
    assert "train.evaluate_every=2 without a decoder, expected both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_features": "nothing"}, r"train.evaluate_every=3 cannot be: features=nothing, expected inception"),
        ({"evaluate_images": 1}, r"train\.evaluate_images=1, expected 2 or more"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_the_first_step(digits: Path, tmp_path: Path, changes, message):
    with pytest.raises(UserError, match=message):
        train_stage1(config_of(digits, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_features_do_not_depend_on_who_judged_which_batch():
    parts = {i: torch.full((2, 3), float(i)) for i in range(4)}
    found = in_order({i: parts[i] for i in (3, 0, 2, 1)})
    assert found[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
