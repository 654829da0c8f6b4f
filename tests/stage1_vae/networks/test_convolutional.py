from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from stage1_vae.networks import ConvolutionalConfig, ConvolutionalDecoder, ConvolutionalEncoder
from stage1_vae.networks.convolutional import ResidualBlock
from stage1_vae.vae import VAE, VAEConfig

CONFIG = ConvolutionalConfig(widths=(3, 4, 5), residual_blocks=2, activation="elu", skip=False)
ACTIVATIONS = {"relu": torch.relu, "elu": F.elu, "silu": lambda x: x * torch.sigmoid(x)}


def by_pixel_blocks(weight: Tensor, bias: Tensor, images: Tensor) -> Tensor:
    """A convolution of 2x2 pixels side by side as one product: n c 2h 2w -> n d h w."""
    n, c, height, width = images.shape
    blocks = images.reshape(n, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return (blocks @ weight.flatten(1).t() + bias).permute(0, 3, 1, 2)


def to_pixel_blocks(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """n c h w -> n d 2h 2w: the four pixels of each, a matrix of its own for each."""
    n, _, height, width = x.shape
    numbers = x.permute(0, 2, 3, 1) @ weight.flatten(1).t() + bias  # n h w (d row column)
    return numbers.unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(n, -1, 2 * height, 2 * width)


def written_out(network: Any, config: ConvolutionalConfig, x: Tensor) -> Tensor:
    """What the layers between the first and the last do, in plain terms."""
    activation = ACTIVATIONS[config.activation]
    latents = x
    encodes = isinstance(network, ConvolutionalEncoder)
    weights = dict(network.named_parameters())

    def layer(name: str, x: Tensor) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if weight.ndim == 2:
            return x @ weight.t() + bias
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    x = layer("first", x if encodes or config.map else x.flatten(1))
    if not encodes and not config.map:
        x = x.unflatten(1, (-1, *network.lowest_size))

    def with_skip(place: int, x: Tensor) -> Tensor:
        if encodes or not config.skip:
            return x
        told = layer(f"skips.{place}", latents if config.map else latents.flatten(1))
        told = told if config.map else told[:, :, None, None]
        times = x.shape[-1] // told.shape[-1]
        return x + (told.repeat_interleave(times, 2).repeat_interleave(times, 3) if config.map else told)

    place = 0
    for resolution in range(len(config.widths)):
        if resolution:
            name = f"layers.{place}.convolution"
            turn = by_pixel_blocks if encodes else to_pixel_blocks
            x = turn(weights[f"{name}.weight"], weights[f"{name}.bias"], with_skip(place, x))
            place += 1
        for _ in range(config.residual_blocks):
            x = with_skip(place, x)
            inner = layer(f"layers.{place}.first", activation(x))
            x = x + layer(f"layers.{place}.second", activation(inner))
            place += 1
    x = activation(with_skip(place, x))
    return layer("last", x.flatten(1) if encodes and not config.map else x)


@pytest.mark.parametrize("activation", ["relu", "elu", "silu"])
@pytest.mark.parametrize("latent_map", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_networks_are_what_their_layers_say(activation: Any, latent_map: bool, skip: bool):
    config = replace(CONFIG, activation=activation, map=latent_map, skip=skip)
    encoder = ConvolutionalEncoder(replace(config, skip=False), (2, 8, 12), 6).double()
    shape = (3, 2, 3) if latent_map else (7,)
    decoder = ConvolutionalDecoder(config, shape, (5, 8, 12)).double()
    images, latents = torch.randn(4, 2, 8, 12, dtype=torch.double), torch.randn(4, *shape, dtype=torch.double)
    features, outputs = encoder(images), decoder(latents)
    assert features.shape == ((4, 6, 2, 3) if latent_map else (4, 6))
    assert outputs.shape == (4, 5, 8, 12)
    torch.testing.assert_close(features, written_out(encoder, config, images))
    torch.testing.assert_close(outputs, written_out(decoder, config, latents))


@pytest.mark.parametrize("latent_map", [False, True])
def test_skip_connections_reach_every_layer(latent_map: bool):
    """Without the way through the first layer, each layer after it still reads the latents."""
    config = replace(CONFIG, map=latent_map, skip=True)
    decoder = ConvolutionalDecoder(config, (3, 2, 3) if latent_map else (7,), (5, 8, 12))
    for parameter in decoder.first.parameters():
        parameter.data.zero_()
    latents = torch.randn(4, *((3, 2, 3) if latent_map else (7,)))
    assert len(decoder.skips) == len(decoder.layers) + 1
    for place in range(len(decoder.skips)):
        kept = {skip: skip.weight.data.clone() for skip in decoder.skips}
        for other, skip in enumerate(decoder.skips):
            if other != place:
                skip.weight.data.zero_()
        outputs = decoder(latents)
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4, place
        for skip, weight in kept.items():
            skip.weight.data.copy_(weight)


@pytest.mark.parametrize("activation", ["relu", "elu", "silu"])
def test_deep_networks_start_well(activation: Any):
    """Numbers, and gradients on the way back, keep their size over 96 convolutions."""
    config = ConvolutionalConfig(widths=(16, 16, 16), residual_blocks=16, activation=activation)
    encoder = ConvolutionalEncoder(config, (3, 16, 16), 16)
    decoder = ConvolutionalDecoder(replace(config, skip=True), (16,), (3, 16, 16))
    for network, inputs in ((encoder, torch.randn(32, 3, 16, 16)), (decoder, torch.randn(32, 16))):
        sizes: list[float] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, x, sizes=sizes: sizes.append(x.std().item()))
            for layer in network.layers
        ]
        outputs = network(inputs)
        for hook in hooks:
            hook.remove()
        assert min(sizes) > 0.4, sizes
        assert max(sizes) < 4, sizes
        assert sizes[-1] > 1.15 * sizes[0], sizes  # blocks do add something
        outputs.square().sum().backward()
        slopes = [layer.first.weight.grad.norm().item() for layer in network.layers if isinstance(layer, ResidualBlock)]
        assert max(slopes) < 30 * min(slopes), slopes


@pytest.mark.parametrize("height", [27, 28, 30])
def test_sides_that_cannot_be_halved_are_refused(height: int):
    config = ConvolutionalConfig(widths=(4, 4, 4, 4))
    message = (
        rf"images of {height}x32 pixels are halved 3 times by widths=\(4, 4, 4, 4\), which takes sides that are "
        "multiples of 8"
    )
    with pytest.raises(UserError, match=message):
        VAE(VAEConfig(encoder=config), (height, 32))
    with pytest.raises(UserError, match=message):
        VAE(VAEConfig(decoder=config), (height, 32))


def test_bad_fields_are_refused():
    with pytest.raises(UserError, match=r"widths=\(\), expected at least one number of channels"):
        ConvolutionalConfig(widths=())
    with pytest.raises(UserError, match=r"widths=\(4, 0\), expected at least one number of channels"):
        ConvolutionalConfig(widths=(4, 0))
    with pytest.raises(UserError, match="residual_blocks=-1, expected 0 or more"):
        ConvolutionalConfig(residual_blocks=-1)
    with pytest.raises(UserError, match=r"model\.encoder\.skip=True, expected False"):
        VAEConfig(encoder=ConvolutionalConfig(skip=True))


def test_a_map_is_read_where_there_is_one():
    with_map, without = replace(CONFIG, map=True), CONFIG
    latents = {
        (with_map, with_map): (2, 2, 3),
        (with_map, without): (2, 2, 3),
        (without, without): (2,),
    }
    for (encoder, decoder), shape in latents.items():
        model = VAE(VAEConfig(latents=2, encoder=encoder, decoder=decoder), (8, 12))
        assert model.shape == shape
        assert model.sample(3).shape == (3, 1, 8, 12)
        assert model(torch.zeros(4, 1, 8, 12), draws=2).log_weights.shape == (2, 4)
    for encoder in (without, replace(with_map, widths=(3, 4))):
        with pytest.raises(UserError, match=r"decoder\.map reads latents of the lowest resolution .* is 2x3, and"):
            VAE(VAEConfig(latents=2, encoder=encoder, decoder=with_map), (8, 12))


@pytest.mark.parametrize(
    "change",
    [
        {"widths": (3, 4, 6)},
        {"residual_blocks": 1},
        {"activation": "relu"},
        {"map": True},
        {"skip": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_the_network(change: dict[str, Any]):
    def reconstruction(config: ConvolutionalConfig) -> Tensor:
        torch.manual_seed(0)
        encoder = replace(config, skip=False)
        model = VAE(VAEConfig(latents=2, encoder=encoder, decoder=config), (8, 12))
        return model.decode(model.encode(torch.linspace(-1, 1, 96).view(1, 1, 8, 12)))

    assert not torch.allclose(reconstruction(CONFIG), reconstruction(replace(CONFIG, **change)), atol=1e-6)
