from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.cli import main
from pipelines.commands.cluster import ClusterConfig, cluster_images
from stage1_vae.binarise import Binarised
from stage1_vae.networks import DenseConfig
from stage1_vae.priors import GaussianMixtureConfig
from stage1_vae.vae import VAE, VAEConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes that a linear encoder tells apart, and a file that is none."""
    chance = np.random.default_rng(0)
    for name, columns in (("left", slice(0, 4)), ("right", slice(4, 8))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = chance.integers(0, 40, (8, 8), dtype=np.uint8)
            pixels[:, columns] += 200
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "left" / "x.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    prior = GaussianMixtureConfig(clusters=3, start_images=20)
    config = VAEConfig(latents=1, encoder=DenseConfig(hidden=()), prior=prior)
    vae = VAE(config, (8, 8), Binarised("none"))
    with torch.no_grad():
        last = vae.encoder.layers.layers[-1]  # type: ignore[union-attr, index]
        last.weight.zero_()
        last.weight[0] = torch.linspace(-1, 1, 8).repeat(8) / 8  # the mean: how far to the right it is bright
        last.bias.zero_()
        vae.prior.means.copy_(torch.tensor([[-1.5], [1.5], [50.0]]))
    return vae.save_pretrained(tmp_path / "model")


def test_images_are_sorted_told_and_shown(model: Path, folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert main(["cluster", "--model", str(model), "--images", str(folder), "--out", str(out)]) == 0
    line = capsys.readouterr().out
    assert "24 images in 2 of 3 clusters of 0 to 12 images" in line
    assert "accuracy 100.0%" in line
    assert "purity 100.0%" in line
    with (out / "clusters.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["class"], row["cluster"]) for row in rows} == {("left", "0"), ("right", "1")}
    assert {row["image"] for row in rows} >= {"left/0.png", "right/11.png"}
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)
    sheet = np.asarray(Image.open(out / "sheet.png").convert("L"))
    assert sheet.std() > 20
    with pytest.raises(UserError, match="begun with other settings"):
        cluster_images(ClusterConfig(model=str(model), images=str(folder), out=str(out), num=5))


def test_a_model_without_clusters_is_refused(folder: Path, tmp_path: Path):
    plain = VAE(VAEConfig(latents=1), (8, 8), Binarised("none")).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"sorts nothing into clusters .*mnist_vade"):
        cluster_images(ClusterConfig(model=str(plain), images=str(folder), out=str(tmp_path / "out")))
