"""A quickstart's folder in small, a second run beside it, and a VAE's run: untrained models, logs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from codes.shards import CodeShardWriter
from images.datasets import DataConfig, ImageDataset, open_images, to_float
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.networks import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from stage2_prior.priors import Transformer, TransformerConfig
from tests.pipelines.conftest import make_autoencoder

CLASSES = ("<script>alert(1)</script>", "a & b", "plain")


def write_run(
    folder: Path, stage: str, config: dict[str, Any], metrics: list[dict[str, Any]], speed: float = 100.0
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"stage": stage, "data": {}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    timing = [
        {"step": step, "images": 64 * step, "seconds": 0.7 * step, "training_seconds": 0.64 * step,
         "waiting_seconds": 0.01 * step, "images_per_second": speed, "waiting_share": 0.01}
        for step in (10, 20)
    ]  # fmt: skip
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))
    return folder


def stage1_lines(best: float) -> list[dict[str, Any]]:
    train = [{"step": step, "split": "train", "loss": 1 / step, "perplexity": float(step)} for step in (10, 20, 30)]
    train[1]["loss"] = float("nan")
    return [*train, *({"step": step, "split": "validation", "psnr": best - 10 / step} for step in (10, 30))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """quick & <b>/ (stage1, codes, stage2, model), other/ (a run of stage one), vae/ (a run of a VAE)."""
    root = tmp_path_factory.mktemp("reported")
    data = {"path": str(digits), "image_size": 16, "channels": 1, "validation_count": 12}
    quick = root / "quick & <b>"
    autoencoder = make_autoencoder()
    config = {"model": {"kind": "vqvae", "width": 8}, "data": data, "train": {"steps": 30, "save_every": 10}}
    autoencoder.save_pretrained(write_run(quick / "stage1", "stage one", config, stage1_lines(20.0)) / "model")
    images = ImageDataset(open_images(DataConfig(**data)), DataConfig(**data))
    spec = autoencoder.code_spec()
    writer = CodeShardWriter(
        quick / "codes",
        spec,
        ("train", "validation"),
        class_names=CLASSES,
        stage1_fingerprint=autoencoder.fingerprint(),
    )
    for number, chosen in enumerate((list(range(48)), list(range(48, 60)))):
        batch = images.fetch(chosen, chosen)
        codes = autoencoder.encode(to_float(batch["images"]))
        writer.write(number, codes, batch["labels"], [f"{i}" for i in chosen])
    writer.finish()
    torch.manual_seed(1)
    prior = Transformer(
        TransformerConfig(layers=1, width=16, heads=2), spec, 3, class_names=CLASSES,
        stage1_fingerprint=autoencoder.fingerprint(),
    ).eval()  # fmt: skip
    lines = [{"step": step, "split": "validation", "bits_per_code": 4 - step / 30} for step in (10, 20)]
    config = {"model": {"kind": "transformer"}, "codes": str(quick / "codes"), "train": {"steps": 20}}
    prior.save_pretrained(write_run(quick / "stage2", "stage two", config, lines) / "model")
    TwoStagePipeline(autoencoder, prior).save_pretrained(quick / "model")
    config = {"model": {"kind": "vqvae", "width": 16}, "data": data, "train": {"steps": 40, "save_every": 10}}
    other = make_autoencoder(codebook_size=8)
    other.save_pretrained(write_run(root / "other", "stage one", config, stage1_lines(25.0)) / "model")
    torch.manual_seed(2)
    dense = DenseConfig(hidden=(16,))
    vae = VAE(VAEConfig(latents=2, encoder=dense, decoder=dense), (16, 16)).eval()
    config = {"model": {"kind": "vae"}, "data": data, "binarised": "threshold", "train": {"steps": 20}}
    config["objective"] = {"kind": "elbo"}
    lines = [{"step": 10, "split": "validation", "negative_elbo": 150.0}]
    vae.save_pretrained(write_run(root / "vae", "stage one (VAE)", config, lines) / "model")
    return root
