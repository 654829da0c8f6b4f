"""What a codebook owes its owners: names in saved models, and an average that does not mix what a latent replaced."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.options import read_recipe
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import (
    MultiscaleQuantizerConfig,
    NearestQuantizer,
    NearestQuantizerConfig,
    QuantizerConfig,
    ResidualQuantizerConfig,
)
from stage1_vq.train import Stage1Config
from training.ema import EMA
from training.optimizers import load_optimizer_tensors, names_of_weights, optimizer_tensors

BY_GRADIENT = NearestQuantizerConfig(codebook_size=48, dim=6, codebook_update="gradient", revive_after=2)


def autoencoder(quantizer: QuantizerConfig) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(width=8, residual_width=4, residual_blocks=1, quantizer=quantizer), (16, 16))


def train(model: VQVAE, ema: EMA, steps: int) -> int:
    """Returns how many codes were revived."""
    optimizer, revived = torch.optim.Adam(model.parameters(), lr=1e-4), 0
    codebook = next(module for module in model.modules() if hasattr(module, "steps_since_revival"))
    for step in range(steps):
        torch.manual_seed(step)
        images = torch.rand(4, 3, 16, 16) * 2 - 1
        sum(model(images).losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update()
        ema.update(100_000)  # long after the warm-up of its decay
        revived += int((codebook.steps_since_revival == 0).sum())
    return revived


def cosines(model: VQVAE, ema: EMA) -> Tensor:
    """Of each code vector and its average."""
    pairs = zip(model.state_dict().items(), ema.model.state_dict().values(), strict=True)
    found = [F.cosine_similarity(one, other) for (name, one), other in pairs if name.endswith("codebook")]
    return torch.cat(found)


@pytest.mark.parametrize(
    "quantizer",
    [
        BY_GRADIENT,
        ResidualQuantizerConfig(depth=2, layer=BY_GRADIENT),
        MultiscaleQuantizerConfig(
            scales=(1, 4), codebook_size=48, dim=6, phis=1, codebook_update="gradient", revive_after=2
        ),
    ],
)
def test_the_average_of_a_revived_vector_begins_anew(quantizer):
    model = autoencoder(quantizer)
    ema = EMA(model, decay=0.999)
    assert train(model, ema, 6) > 20, "the test must see revivals"
    assert cosines(model, ema).min() > 0.99


def test_vectors_that_live_on_are_averaged_as_all_weights():
    model = autoencoder(BY_GRADIENT)
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.quantizer.codebook.add_(1.0)
        ema.model.quantizer.codebook.zero_()
    ema.update(100_000)  # no update of the quantizer: no code has just been revived
    model.quantizer.entries.steps_since_revival.fill_(3)
    with torch.no_grad():
        ema.model.quantizer.codebook.zero_()
    ema.update(100_000)
    torch.testing.assert_close(ema.model.quantizer.codebook, 0.1 * model.quantizer.codebook)


def test_a_codebook_by_moving_averages_is_copied_beside_the_averaged_networks():
    model = autoencoder(NearestQuantizerConfig(codebook_size=48, dim=6))
    ema = EMA(model, decay=0.999)
    train(model, ema, 3)
    assert torch.equal(ema.model.quantizer.codebook, model.quantizer.codebook)


# ---- first vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize(
    ("init", "length", "largest"),
    [
        ("unit", 1.0, 1.0),
        ("normal", 8.0, 5.5),
        ("uniform", (64 / 3) ** 0.5 / 512, 1 / 512),  # as VQ-GAN's: all codes begin near the origin
    ],
)
def test_code_vectors_begin_as_the_config_says(update, init, length, largest):
    torch.manual_seed(0)
    quantizer = NearestQuantizer(
        NearestQuantizerConfig(codebook_size=512, dim=64, codebook_update=update, init=init, kmeans_iterations=0)
    )
    codebook = quantizer.codebook.detach()
    assert float(codebook.norm(dim=1).mean()) == pytest.approx(length, rel=0.02)
    assert 0.5 * largest < float(codebook.abs().max()) <= largest
    assert update == "gradient" or torch.equal(quantizer.entries.vector_sums, codebook)


def test_vectors_compared_by_direction_begin_at_length_one_however_they_are_drawn():
    for init in ("unit", "normal", "uniform"):
        quantizer = NearestQuantizer(NearestQuantizerConfig(codebook_size=32, dim=4, l2_normalise=True, init=init))
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize(
    ("recipe", "init"),
    [("imagenet256_vqgan", "uniform"), ("imagenet256_multiscale", "uniform"), ("imagenet256_dvae", "dalle")],
)
def test_published_recipes_begin_as_their_sources(recipe, init):
    config, _ = read_recipe("train-stage1", Stage1Config, "stage1", ["--config", recipe, "--data.path", "."])
    assert config.model.quantizer.init == init


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_state_dict_has_the_codebook_under_its_owners_own_names():
    quantizer = NearestQuantizer(NearestQuantizerConfig(codebook_size=8, dim=4))
    names = {
        "codebook", "cluster_sizes", "vector_sums", "steps_since_revival", "usage.steps", "usage.steps_since_use",
    }  # fmt: skip
    assert set(quantizer.state_dict()) == names
    assert set(quantizer.state_dict(prefix="a.")) == {f"a.{name}" for name in names}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own_tensors_under_the_same_names(copied):
    model = autoencoder(BY_GRADIENT)
    twin = copied(model)
    with torch.no_grad():
        twin.quantizer.codebook.zero_()
    assert model.quantizer.codebook.abs().sum() > 0
    assert twin.state_dict().keys() == model.state_dict().keys()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.quantizer.codebook, model.quantizer.codebook)


def test_a_missing_tensor_is_missed():
    model = autoencoder(BY_GRADIENT)
    state = model.state_dict()
    del state["quantizer.codebook"]
    with pytest.raises(RuntimeError, match=r"Missing key.*quantizer\.entries\.codebook"):
        model.load_state_dict(state)


def test_an_optimiser_is_saved_by_the_names_of_the_state_dict():
    model = autoencoder(BY_GRADIENT)
    assert set(names_of_weights(model).values()) <= model.state_dict().keys()
    assert "quantizer.codebook" in names_of_weights(model).values()
    optimizer = torch.optim.Adam(model.parameters())
    sum(model(torch.zeros(1, 3, 16, 16)).losses.values()).backward()
    optimizer.step()
    saved = optimizer_tensors(optimizer, model)
    assert "exp_avg/quantizer.codebook" in saved
    other = torch.optim.Adam(model.parameters())
    load_optimizer_tensors(other, model, saved)
    assert torch.equal(
        optimizer_tensors(other, model)["exp_avg/quantizer.codebook"], saved["exp_avg/quantizer.codebook"]
    )
