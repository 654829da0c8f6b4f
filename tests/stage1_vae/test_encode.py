from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from codes.latents import LatentDataset, LatentShardWriter
from common.errors import UserError
from images.datasets import DataConfig, image_datasets, to_float
from images.encoding import EncodeConfig, EncodeDataConfig
from pipelines.commands.encode import encode_images as encode_command
from stage1_vae.binarise import Binarised, NumberedImages
from stage1_vae.encode import encode
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.posteriors import Posterior
from stage1_vae.vae import VAE, VAEConfig


@pytest.fixture
def images(tmp_path: Path) -> DataConfig:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(30) % 3)
    return DataConfig(path=str(tmp_path / "images.npz"), image_size=8, channels=1, validation_count=6)


def save_run(run: Path, data: DataConfig, binarised: Binarised | None = None) -> VAE:
    """What a run of a VAE leaves for `encode`."""
    torch.manual_seed(0)
    model = VAE(
        VAEConfig(latents=3, encoder=DenseConfig(hidden=(16,)), decoder=DenseConfig(hidden=(16,))), (8, 8), binarised
    )
    model.eval().save_pretrained(run / "model")
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {**asdict(data)}}))
    return model


def config(run: Path, out: Path, **changes: Any) -> EncodeConfig:
    return EncodeConfig(
        **{"model": str(run), "out": str(out), "batch_size": 4, "shard_size": 10, "workers": 0, **changes}
    )


@pytest.mark.parametrize("binarised", ["none", "threshold", "once", "anew"])
def test_every_image_has_its_posterior(images: DataConfig, tmp_path: Path, binarised: str):
    model = save_run(tmp_path / "run", images, Binarised(binarised, 7))
    summary = encode(config(tmp_path / "run", tmp_path / "latents"))
    assert summary.startswith("24 training and 6 held-out images as 3 latents (8x8x1 images), in ")
    for split, source in zip(("train", "validation"), image_datasets(images, seed=1), strict=True):
        latents = LatentDataset(tmp_path / "latents", split)  # type: ignore[arg-type]
        shown = NumberedImages(source, binarised, 7, training=False).fetch(range(len(source)), range(len(source)))  # type: ignore[arg-type]
        with torch.no_grad():
            posterior = model.posterior(to_float(shown["images"]))
        found = latents.fetch(range(len(latents)), range(len(latents)))
        torch.testing.assert_close(found["mean"], posterior.mean)
        torch.testing.assert_close(found["log_scale"], posterior.log_scale)
        assert torch.equal(found["labels"], shown["labels"])
        assert latents.names() == source.names(range(len(source)))
        assert latents.stage1_fingerprint == model.fingerprint()
        latents.verify()


class PowerCut(BaseException):
    """Not an Exception, so that nothing in between can handle it."""


@pytest.mark.parametrize("after", [0, 1, 3])
def test_interrupted_and_continued_is_the_same_byte_for_byte(
    images: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    save_run(tmp_path / "run", images)
    encode(config(tmp_path / "run", tmp_path / "whole"))
    write, written = LatentShardWriter.write, list[int]()

    def until_the_power_is_cut(self: Any, number: int, latents: Mapping[str, torch.Tensor], *rest: Any) -> None:
        if len(written) == after:
            raise PowerCut
        written.append(number)
        write(self, number, latents, *rest)

    monkeypatch.setattr(LatentShardWriter, "write", until_the_power_is_cut)
    with pytest.raises(PowerCut):
        encode(config(tmp_path / "run", tmp_path / "parts"))
    monkeypatch.setattr(
        LatentShardWriter, "write", lambda *arguments: (written.append(arguments[1]), write(*arguments))
    )
    encode(config(tmp_path / "run", tmp_path / "parts"))
    assert sorted(written) == [0, 1, 2, 3]  # each shard once
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "parts")
    )
    assert whole == parts


def test_latents_of_another_model_are_refused(images: DataConfig, tmp_path: Path):
    model = save_run(tmp_path / "run", images)
    encode(config(tmp_path / "run", tmp_path / "latents"))
    with torch.no_grad():
        model.encoder.layers.layers[0].bias.add_(1)
    model.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"other latents than these \(different: stage1_fingerprint\)"):
        encode(config(tmp_path / "run", tmp_path / "latents"))


def test_images_binarised_otherwise_are_other_latents(images: DataConfig, tmp_path: Path):
    save_run(tmp_path / "run", images, Binarised("once"))
    encode(config(tmp_path / "run", tmp_path / "latents"))
    save_run(tmp_path / "run", images, Binarised("threshold"))
    with pytest.raises(UserError, match=r"\(different: stage1_fingerprint, binarised\)"):
        encode(config(tmp_path / "run", tmp_path / "latents"))


def test_images_of_another_size_are_refused_before_anything_is_written(images: DataConfig, tmp_path: Path):
    save_run(tmp_path / "run", images)
    with pytest.raises(UserError, match=r"data.image_size=16 .* expected images of 8x8x1"):
        encode(config(tmp_path / "run", tmp_path / "latents", data=EncodeDataConfig(image_size=16)))
    assert not (tmp_path / "latents").exists()


def test_posteriors_of_another_kind_are_stored_by_their_means(
    images: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Other(Posterior):
        mean = property(lambda self: self.where)  # type: ignore[assignment]

        def __init__(self, where: torch.Tensor) -> None:
            self.where = where

    model = save_run(tmp_path / "run", images)
    plain = VAE.posterior
    monkeypatch.setattr(VAE, "posterior", lambda self, images: Other(plain(self, images).mean))
    encode(config(tmp_path / "run", tmp_path / "latents"))
    latents = LatentDataset(tmp_path / "latents")
    assert not latents.latent_spec.scales
    source = image_datasets(images, seed=1)[0].fetch(range(24), range(24))
    with torch.no_grad():
        expected = model.encode(to_float(source["images"]))
    found = latents.fetch(range(24), range(24))
    assert "log_scale" not in found
    torch.testing.assert_close(found["mean"], expected)


def test_the_command_looks_at_the_kind_of_the_model(images: DataConfig, tmp_path: Path):
    save_run(tmp_path / "run", images)
    assert "3 latents" in encode_command(config(tmp_path / "run", tmp_path / "latents"))
    with pytest.raises(UserError, match="is a folder of latent shards, expected a model"):
        encode_command(config(tmp_path / "latents", tmp_path / "more"))
