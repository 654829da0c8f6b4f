"""From a file of the published implementation, by the command, to a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from pipelines.commands.import_weights import ImportConfig, import_weights
from pipelines.latents.models import load_vae
from pipelines.options import read_recipe
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.imports.vdvae import original_name, published_configs
from stage1_vae.likelihoods import LogisticMixtureConfig
from stage1_vae.train import Stage1VAEConfig

CONFIG: dict[str, Any] = {
    "dataset": "cifar10",
    "width": 8,
    "zdim": 2,
    "enc_blocks": "4x1,4d4,1x1",
    "dec_blocks": "1x1,4m1",
    "bottleneck_multiple": 0.5,
    "num_mixtures": 2,
    "lr": 0.0002,  # of training: nothing to a model
}


@pytest.fixture
def model() -> VDVAE:
    torch.manual_seed(0)
    return VDVAE(
        VDVAEConfig(
            width=8, latents=2, encoder_layers="4x1,4d4,1x1", decoder_layers="1x1,4m1", bottleneck_multiple=0.5,
            likelihood=LogisticMixtureConfig(components=2),
        ),
        (4, 4),
    )  # fmt: skip


def published(model: VDVAE) -> dict[str, Tensor]:
    return {f"module.{original_name(key)}": tensor for key, tensor in model.state_dict().items()}


def files(folder: Path, weights: dict[str, Any], config: dict[str, Any] | None = None) -> ImportConfig:
    torch.save(weights, folder / "iter-1-model.th")
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    given = None if config == {} else str(folder / "config.json")
    return ImportConfig(kind="vdvae", weights=str(folder / "iter-1-model.th"), config=given, out=str(folder / "model"))


def test_the_command_makes_a_model_folder_of_the_averaged_weights(model: VDVAE, tmp_path: Path):
    config = files(tmp_path, {key: tensor + 1 for key, tensor in published(model).items()})
    line = import_weights(config)
    assert line.startswith("34 latents in 2 groups (4x4x3 images): the vdvae model is in ")
    assert "averaged" not in line
    torch.save(published(model), tmp_path / "iter-1-model-ema.th")
    assert f"of the averaged weights beside it, {tmp_path / 'iter-1-model-ema.th'}" in import_weights(config)
    imported = load_vae(tmp_path / "model")
    assert imported.fingerprint() == model.fingerprint()
    assert imported.generator_parameters()  # a hierarchy like any other


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zdim": 3}, "zdim=3, but the weights are of a model with zdim=2"),
        ({"dataset": "faces"}, r"dataset=faces, expected one of cifar10, .*, or shift and scale"),
        ({"dataset": "ffhq_256"}, "dataset=ffhq_256, expected one of 8-bit images"),
        ({"dec_blocks": "1x2,4m1"}, r"missing: .*decoder.dec_blocks.2"),
        ({"bottleneck_multiple": 0.25}, r"wrong shapes: encoder.enc_blocks.0.c1.weight is 4x8x1x1, not 2x8x1x1"),
        ({"enc_blocks": "4x1,4d4,2x1"}, "block at resolution 2 behind one that leaves 1"),
    ],
)
def test_configs_of_other_weights_are_told(model: VDVAE, tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        import_weights(files(tmp_path, published(model), CONFIG | changes))


def test_weights_of_other_models_are_told(model: VDVAE, tmp_path: Path):
    config = ImportConfig(kind="vdvae", weights=files(tmp_path, published(model)).weights, out=str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"3 blocks in the encoder and 2 .* none of the published .* --config"):
        import_weights(config)
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "iter-1-model.th")
    with pytest.raises(UserError, match=r"no encoder.in_conv.weight of 4 axes: they are not those of a VD-VAE"):
        import_weights(config)


def test_options_of_other_kinds_are_refused(model: VDVAE, tmp_path: Path):
    config = files(tmp_path, published(model))
    other = ImportConfig(kind="vdvae", weights=config.weights, config=config.config, out=config.out, image_size=32)
    with pytest.raises(UserError, match="--image_size is not for --kind vdvae"):
        import_weights(other)


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [
        ("vdvae_cifar10_published", "cifar10"),
        ("vdvae_imagenet32", "imagenet32"),
        ("vdvae_imagenet64", "imagenet64"),
    ],
)
def test_recipes_are_those_that_are_imported(recipe: str, dataset: str):
    config, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", ["--config", recipe])
    assert config.model == published_configs()[dataset]
    assert VDVAEConfig() == published_configs()["cifar10"]
    assert config.train.betas == (0.9, 0.9)
