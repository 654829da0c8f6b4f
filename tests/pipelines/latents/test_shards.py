"""`zellige codes` on latent shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codes.latents import LatentShardWriter, LatentSpec
from common.errors import UserError
from pipelines.commands.codes import CodesExportConfig, CodesInfoConfig, CodesVerifyConfig, export, info, verify
from stage1_vae.vae import VAE, VAEConfig


def write(folder: Path, *, fingerprint: str = "", names: str = "abcdef", label: int = 1) -> Path:
    writer = LatentShardWriter(
        folder,
        LatentSpec((3,), True, 8, 8, 1),
        ["train", "validation"],
        class_names="xy",
        stage1_fingerprint=fingerprint,
    )
    mean = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 1.0, 0.01])
    writer.write(0, {"mean": mean, "log_scale": torch.zeros(6, 3)}, torch.full((6,), label), list(names))
    writer.write(1, {"mean": mean[:2], "log_scale": torch.zeros(2, 3)}, torch.zeros(2), list("gh"))
    writer.finish()
    return folder


def test_info_tells_how_many_numbers_are_used(tmp_path: Path):
    lines = info(CodesInfoConfig(codes=str(write(tmp_path)))).splitlines()
    assert lines[0] == (
        "6 training and 2 held-out images as 3 latents (8x8x1 images), mean and scale of each posterior"
    )
    assert lines[2] == "classes:     2: x, y"
    assert lines[-1].startswith("training means: variance above 0.01 in 2 of 3 numbers, largest ")


def test_verify_reads_everything(tmp_path: Path):
    folder = write(tmp_path / "latents")
    assert verify(CodesVerifyConfig(codes=str(folder))) == (
        f"{folder} is sound: 2 shards, 6 training and 2 held-out images, all checksums right, no image more often than "
        "asked for"
    )
    twice = write(tmp_path / "twice", names="abcdea")
    with pytest.raises(UserError, match="holds image 'a' 2 times among the train images"):
        verify(CodesVerifyConfig(codes=str(twice)))
    labels = write(tmp_path / "labels", label=2)
    with pytest.raises(UserError, match="holds labels from 2 to 2, expected -1 to 1"):
        verify(CodesVerifyConfig(codes=str(labels)))
    shard = folder / "latents-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="its checksum is not that of"):
        verify(CodesVerifyConfig(codes=str(folder)))


def test_verify_compares_the_vae(tmp_path: Path):
    vae = VAE(VAEConfig(latents=3), (8, 8)).eval()
    vae.save_pretrained(tmp_path / "vae")
    mine = write(tmp_path / "mine", fingerprint=vae.fingerprint())
    verify(CodesVerifyConfig(codes=str(mine), model=str(tmp_path / "vae")))
    other = write(tmp_path / "other", fingerprint="beef")
    with pytest.raises(UserError, match="holds latents of VAE beef"):
        verify(CodesVerifyConfig(codes=str(other), model=str(tmp_path / "vae")))


def test_latents_are_not_exported(tmp_path: Path):
    with pytest.raises(UserError, match="is a folder of latent shards, expected code shards"):
        export(CodesExportConfig(codes=str(write(tmp_path / "latents")), out=str(tmp_path / "out")))
