from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.decoders import PixelCNNDecoder, PixelCNNDecoderConfig
from stage1_vae.likelihoods import BernoulliConfig, CategoricalConfig, LogisticMixtureConfig, build_likelihood
from stage1_vae.networks import ConvolutionalConfig, DenseConfig
from stage1_vae.networks.pixelcnn import GatedLayer, PixelCNNNetwork
from stage1_vae.vae import VAE, VAEConfig

CONFIG = PixelCNNDecoderConfig(
    layers=2, width=4, first_kernel_size=5, output_width=6, network=DenseConfig(hidden=()), features=3
)
LIKELIHOODS = {
    "bernoulli": (BernoulliConfig(), 1),
    "bernoulli, three channels": (BernoulliConfig(), 3),
    "categorical": (CategoricalConfig(), 1),
    "logistic mixture": (LogisticMixtureConfig(components=2), 1),
    "logistic mixture, colours": (LogisticMixtureConfig(components=2), 3),
}


def decoder(
    size: tuple[int, int], config: PixelCNNDecoderConfig = CONFIG, likelihood: Any = None, channels: int = 1
) -> PixelCNNDecoder:
    """Of latents of 2 numbers, with weights large enough that pixels depend on one another."""
    torch.manual_seed(2)
    made = PixelCNNDecoder(config, build_likelihood(likelihood or BernoulliConfig(), channels), (2,), size)
    for parameter in made.parameters():
        parameter.data *= 2
    return made


@pytest.mark.parametrize(
    ("layers", "first_kernel_size", "kernel_size", "reach"), [(2, 5, 3, 3), (1, 3, 7, 1), (3, 3, 5, 5)]
)
def test_a_pixel_sees_what_its_reach_says_and_nothing_after_it(
    layers: int, first_kernel_size: int, kernel_size: int, reach: int
):
    config = PixelCNNDecoderConfig(
        layers=layers, first_kernel_size=first_kernel_size, kernel_size=kernel_size, features=3
    )
    assert config.reach == reach
    network = PixelCNNNetwork(config, channels=2, outputs=3).double()
    images = torch.randn(1, 2, 15, 17, dtype=torch.double, requires_grad=True)
    row, column = 8, 7
    said = network(images, torch.randn(1, 3, 15, 17, dtype=torch.double))[0, :, row, column]
    (slopes,) = torch.autograd.grad(said.square().sum(), images)
    seen = (slopes[0] != 0).all(dim=0)
    expected = torch.zeros(15, 17, dtype=torch.bool)
    expected[row - 1 - reach : row, column - reach : column + reach + 1] = True
    expected[row, column - 1 - reach : column] = True
    assert torch.equal(seen, expected)
    assert torch.equal((slopes[0] != 0).any(dim=0), expected)


def test_probabilities_of_all_images_add_up_to_one():
    model = decoder((2, 3))
    images = torch.tensor(list(product([-1.0, 1.0], repeat=6))).view(64, 1, 2, 3)
    with torch.no_grad():
        for latents in torch.randn(3, 2):
            p = model.log_likelihood(latents.expand(1, 64, 2), images)[0].exp()
            assert p.sum().item() == pytest.approx(1, abs=1e-5)
            assert p.max() > 2 * p.min()  # and it is not uniform


def test_draws_are_as_frequent_as_their_probability_says():
    model, count = decoder((2, 2)), 40_000
    latents = torch.tensor([0.5, -1.0])
    draws = model.sample(latents.expand(count, 2), torch.Generator().manual_seed(0))
    numbers = ((draws.flatten(1) + 1) / 2 * torch.tensor([8, 4, 2, 1])).sum(1).long()
    images = torch.tensor(list(product([-1.0, 1.0], repeat=4))).view(16, 1, 2, 2)
    with torch.no_grad():
        p = model.log_likelihood(latents.expand(1, 16, 2), images)[0].exp()
    seen = torch.bincount(numbers, minlength=16)
    assert ((seen - p * count).abs() < 4 * (p * (1 - p) * count).sqrt()).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_pixel_by_pixel_is_the_same_as_in_one_pass(likelihood: str):
    """What is said of each pixel while an image is made, of parts of rows, is what one pass says of the whole."""
    config, channels = LIKELIHOODS[likelihood]
    model = decoder((9, 11), likelihood=config, channels=channels)
    latents = torch.randn(2, 2)
    for choose in (model.likelihood.sample, model.likelihood.mode):
        said: list[Tensor] = []

        def note(outputs: Tensor, choose: Any = choose, said: list[Tensor] = said) -> Tensor:
            said.append(outputs)
            return choose(outputs)

        images = model.pixels.generate(model.network(latents), note)
        assert images.shape == (2, channels, 9, 11)
        with torch.no_grad():
            expected = model.outputs(latents, images)
        torch.testing.assert_close(
            torch.cat(said, dim=-1).unflatten(-1, (9, 11))[:, :, 0], expected, rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(model.mode(latents), images)  # of the last choice
    with torch.no_grad():
        assert torch.equal(model.likelihood.mode(model.outputs(latents, images)), images)


def test_a_generator_decides_the_draws_and_the_mean_is_one():
    model, latents = decoder((3, 4)), torch.randn(5, 2)
    first, again, other = (model.sample(latents, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    mean = model.mean(latents)
    torch.manual_seed(3)
    assert torch.equal(mean, model.sample(latents))


def test_each_draw_of_the_latents_by_itself():
    model, latents = decoder((3, 4)), torch.randn(5, 2, 2)
    images = torch.randint(0, 2, (2, 1, 3, 4)) * 2.0 - 1
    found = model.log_likelihood(latents, images)
    assert found.shape == (5, 2)
    torch.testing.assert_close(found[3, 1], model.log_likelihood(latents[3:4, 1:], images[1:])[0, 0])
    assert found.std(0).min() > 0.01


def test_every_layer_reads_the_latents():
    """By both gates: with those of all other layers shut out, what is said still depends on the features."""
    network = PixelCNNNetwork(replace(CONFIG, layers=3), channels=1, outputs=2)
    images, features = torch.randn(1, 1, 6, 6), torch.randn(2, 3, 6, 6)
    whole = {layer: layer.condition.weight.data.clone() for layer in network.layers if isinstance(layer, GatedLayer)}
    for place, layer in enumerate(whole):
        for half in (slice(0, 8), slice(8, 16)):  # the vertical gate, the horizontal one
            for other in whole:
                other.condition.weight.data.zero_()
            layer.condition.weight.data[half] = whole[layer][half]
            said = network(images.expand(2, -1, -1, -1), features)
            last_vertical = place == 2 and half.start == 0  # which nothing reads
            assert bool((said[0] - said[1]).abs().max() > 1e-6) != last_vertical


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 3},
        {"width": 6},
        {"first_kernel_size": 3},
        {"kernel_size": 5},
        {"output_width": 8},
        {"network": ConvolutionalConfig(widths=(4, 4), residual_blocks=1)},
        {"features": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_the_result(change: dict[str, Any]):
    latents, images = torch.ones(1, 2, 2), torch.randint(0, 2, (2, 1, 6, 8)) * 2.0 - 1
    first, other = decoder((6, 8)), decoder((6, 8), replace(CONFIG, **change))
    assert not torch.allclose(first.log_likelihood(latents, images), other.log_likelihood(latents, images))


@pytest.mark.parametrize("field", ["layers", "width", "output_width", "features", "first_kernel_size", "kernel_size"])
def test_bad_fields_are_refused(field: str):
    for value in (0, 2) if "kernel" in field else (0, -1):
        with pytest.raises(UserError, match=rf"decoder\.{field}={value}, expected "):
            PixelCNNDecoderConfig(**{field: value})


def test_latents_of_a_map_and_a_model_folder(tmp_path):
    encoder = ConvolutionalConfig(widths=(4, 5), map=True)
    config = VAEConfig(latents=2, encoder=encoder, decoder=replace(CONFIG, network=replace(encoder, skip=True)))
    model = VAE(config, (6, 8))
    assert model.shape == (2, 3, 4)
    model.save_pretrained(tmp_path / "model")
    again = load_pretrained(tmp_path / "model", {"vae": VAE})
    assert again.config == config
    assert again.fingerprint() == model.fingerprint()
    images = torch.randint(0, 2, (2, 1, 6, 8)) * 2.0 - 1
    noise = torch.randn(3, 2, 2, 3, 4)
    torch.testing.assert_close(again(images, noise=noise).log_weights, model(images, noise=noise).log_weights)


def test_gradients_reach_every_weight():
    model = VAE(VAEConfig(latents=2, decoder=replace(CONFIG, network=DenseConfig(hidden=(5,)))), (4, 5))
    images = torch.randint(0, 2, (8, 1, 4, 5)) * 2.0 - 1
    model(images).log_weights.sum().backward()
    without = {
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert not without
