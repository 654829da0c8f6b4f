"""Every packaged recipe can be read, and its model can be built: none rots."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from pipelines.options import read_recipe
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.codes import CodeSpec
from stage1_vq.train import Stage1Config
from stage2_prior.priors import PRIORS
from stage2_prior.train import Stage2Config

CONFIGS = Path(str(files("configs")))

# The autoencoder that makes the codes of each prior, and the number of classes of its images.
STAGE1_OF = {
    "mnist_quickstart": ("mnist_quickstart", 10),
    "mnist_pixelcnn": ("mnist_vqvae", 10),
    "cifar10_pixelcnn": ("cifar10_vqvae", 10),
    "cifar10_pixelcnn_short": ("cifar10_vqvae_short", 10),
    "cifar10_transformer": ("cifar10_vqvae", 10),
    "folder": ("folder", 0),
}


def recipes(stage: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / stage).glob("*.yaml"))


def stage1(name: str) -> Stage1Config:
    return read_recipe("train-stage1", Stage1Config, "stage1", ["--config", name])[0]


def code_spec(name: str) -> CodeSpec:
    """The codes that an autoencoder of this recipe makes, without the memory for its weights."""
    config = stage1(name)
    with torch.device("meta"):
        autoencoder = AUTOENCODERS[config.model.kind](config.model, (config.data.height, config.data.width))
    return autoencoder.code_spec()


@pytest.mark.parametrize(
    ("name", "codes"),
    {
        "mnist_quickstart": "7x7 codes of 128 (28x28x1 images)",
        "mnist_vqvae": "7x7 codes of 256 (28x28x1 images)",
        "cifar10_vqvae": "8x8 codes of 512 (32x32x3 images)",
        "cifar10_vqvae_short": "8x8 codes of 512 (32x32x3 images)",
        "imagenet128_vqvae": "32x32 codes of 512 (128x128x3 images)",
        "folder": "16x16 codes of 1024 (128x128x3 images)",
    }.items(),
)
def test_stage_one_recipes_make_the_codes_they_announce(name, codes):
    assert code_spec(name).describe() == codes
    assert stage1(name).data.channels == stage1(name).model.channels


@pytest.mark.parametrize("name", recipes("stage2"))
def test_stage_two_recipes_build_a_prior_for_their_codes(name):
    config, run = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", name])
    stage1_name, classes = STAGE1_OF[name]
    with torch.device("meta"):
        prior = PRIORS[config.model.kind](config.model, code_spec(stage1_name), classes)
    assert sum(weight.numel() for weight in prior.parameters()) > 10_000
    assert run == Path("runs") / name


def test_no_recipe_is_left_out_of_these_tests():
    assert set(recipes("stage1")) == {
        "mnist_quickstart", "mnist_vqvae", "cifar10_vqvae", "cifar10_vqvae_short", "imagenet128_vqvae",
        "folder",
    }  # fmt: skip
    assert set(recipes("stage2")) == set(STAGE1_OF)


@pytest.mark.parametrize("name", ["cifar10_vqvae", "imagenet128_vqvae"])
def test_published_recipes_have_the_published_figures(name):
    config = stage1(name)
    model, quantizer, train = config.model, config.model.quantizer, config.train
    assert (model.width, model.residual_blocks, model.downsamplings) == (256, 2, 2)
    assert (quantizer.codebook_size, quantizer.dim) == (512, 64)
    assert (quantizer.commitment_weight, quantizer.codebook_update, quantizer.decay) == (0.25, "ema", 0.99)
    assert (train.learning_rate, train.batch_size, train.steps, train.schedule) == (
        2e-4,
        128,
        250_000,
        "constant",
    )
