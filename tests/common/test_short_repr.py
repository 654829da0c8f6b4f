"""Objects at a prompt: one line each."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from codes.shards import CodeDataset, CodeShardWriter
from codes.spec import CodeSpec, Grid
from common.short_repr import weights_of
from images.datasets import DataConfig
from images.encoding import EncodeConfig
from stage1_vae.train import Stage1VAEConfig
from stage1_vae.vae import VAE, VAEConfig
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage1_vq.train import Stage1Config
from stage2_prior.priors import Transformer, TransformerConfig
from stage2_prior.sampling import SamplingConfig
from stage2_prior.train import Stage2Config
from training.config import TrainConfig


def test_configs_say_what_differs_from_the_defaults():
    train = TrainConfig(steps=3, precision="bf16")
    assert repr(train) == "TrainConfig(steps=3, precision='bf16')"
    assert eval(repr(train)) == train
    assert repr(DataConfig(path="photos", image_size=(64, 48))) == "DataConfig(path='photos', image_size=(64, 48))"
    assert repr(SamplingConfig()) == "SamplingConfig()"
    assert repr(SamplingConfig(temperature=0.9)) == "SamplingConfig(temperature=0.9)"
    assert repr(EncodeConfig(model="run", out="codes")) == "EncodeConfig(model='run', out='codes')"
    quantizer = NearestQuantizerConfig(codebook_size=9)
    whole = Stage1Config(model=VQVAEConfig(quantizer=quantizer), data=DataConfig(path="photos"), train=train)
    assert repr(whole) == (
        "Stage1Config(model=VQVAEConfig(quantizer=NearestQuantizerConfig(codebook_size=9)), "
        "data=DataConfig(path='photos'), train=TrainConfig(steps=3, precision='bf16'))"
    )
    assert eval(repr(whole)) == whole
    vae = Stage1VAEConfig(model=VAEConfig(latents=3), data=DataConfig(path="mnist", channels=1), train=TrainConfig())
    assert eval(repr(vae)) == vae
    prior = Stage2Config(model=TransformerConfig(layers=2), train=TrainConfig(), codes="codes")
    assert repr(prior) == "Stage2Config(model=TransformerConfig(layers=2), train=TrainConfig(), codes='codes')"


def test_models_say_their_kind_sizes_types_and_place():
    vqvae = VQVAE(VQVAEConfig(channels=1, width=8, residual_width=4, residual_blocks=1), (16, 16))
    count = sum(weight.numel() for weight in vqvae.parameters())
    assert repr(vqvae) == f"VQVAE(4x4 codes of 512 (16x16x1 images), {count:,} parameters, float32 on cpu)"
    prior = Transformer(TransformerConfig(layers=1, width=16, heads=2), vqvae.code_spec(), 3)
    assert "4x4 codes of 512 (16x16x1 images), 3 classes, " in repr(prior.bfloat16())
    assert repr(prior).endswith("parameters, bfloat16 on cpu)")
    vae = VAE(VAEConfig(latents=5), (8, 6))
    assert repr(vae).startswith("VAE(5 latents (8x6x1 images), ")
    assert "\n" not in f"{vqvae}{prior}{vae}"


def test_models_in_several_types_or_none():
    both = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1).half()])
    assert weights_of(both) == "6 parameters, float16 and float32 on cpu"
    assert weights_of(nn.Linear(1, 1, device="meta")) == "2 parameters, float32 on meta"
    assert weights_of(nn.ReLU()) == "no parameters"


def test_shards_say_what_they_hold(tmp_path: Path):
    spec = CodeSpec((Grid("map", 2, 3, 7),), 8, 12, 1)
    writer = CodeShardWriter(tmp_path / "codes", spec, ["train", "validation"], class_names=["a", "b"])
    for number in range(2):
        writer.write(
            number, (torch.zeros(2 - number, 2, 3, dtype=torch.long),), torch.zeros(2 - number), ["x"] * (2 - number)
        )
    writer.finish()
    folder = str(tmp_path / "codes")
    assert repr(CodeDataset(folder)) == (
        f"CodeDataset({folder!r}, 2 images of train, 2x3 codes of 7 (8x12x1 images), 2 classes)"
    )
    assert "1 image of validation" in repr(CodeDataset(folder, "validation"))
