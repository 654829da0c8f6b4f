"""The published network, layer by layer; it learns; wrong configs are refused. More in test_conformance.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from stage1_vq.autoencoders.vqvae import VQVAE, ResidualBlock, VQVAEConfig
from stage1_vq.quantizers.nearest import NearestQuantizerConfig


def tiny(**settings: Any) -> VQVAE:
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=64, dim=16, **settings)
    config = VQVAEConfig(width=32, residual_width=16, residual_blocks=1, quantizer=quantizer)
    return VQVAE(config, (16, 16))


def pictures() -> Tensor:
    """Eight 16x16 colour images, each a disc of some colour, place and size on a slope of another: b c H W."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="xy")
    images = []
    for _ in range(8):
        centre_x, centre_y, radius, slope = torch.rand(4, generator=generator) * 0.8 + 0.1
        inside = ((x - centre_x + 0.5) ** 2 + (y - centre_y + 0.5) ** 2 < radius**2).float()
        disc, ground = torch.rand(2, 3, 1, 1, generator=generator) * 1.6 - 0.8
        images.append(inside * disc + (1 - inside) * (ground + 0.2 * slope * x))
    return torch.stack(images)


def test_the_default_network_is_the_papers():
    model = VQVAE(VQVAEConfig(), (32, 32))
    convolutions = [
        (type(layer).__name__, layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    ]
    block = [("Conv2d", 256, 256, 3, 1), ("Conv2d", 256, 256, 1, 1)]
    assert convolutions == [
        ("Conv2d", 3, 256, 4, 2),
        ("Conv2d", 256, 256, 4, 2),
        *block,
        *block,
        ("Conv2d", 256, 64, 1, 1),
        ("Conv2d", 64, 256, 3, 1),
        *block,
        *block,
        ("ConvTranspose2d", 256, 256, 4, 2),
        ("ConvTranspose2d", 256, 3, 4, 2),
    ]
    assert model.quantizer.codebook.shape == (512, 64)
    assert model.code_spec().describe() == "8x8 codes of 512 (32x32x3 images)"


def test_a_residual_block_adds_relu_3x3_relu_1x1_to_its_input():
    block, x = ResidualBlock(6, 4), torch.randn(2, 6, 5, 5)
    reference = nn.Sequential(nn.ReLU(), block.wide, nn.ReLU(), block.narrow)
    torch.testing.assert_close(block(x), x + reference(x))


def test_the_reconstruction_loss_is_the_squared_error_over_the_data_variance():
    model = VQVAE(VQVAEConfig(width=8, residual_width=8, data_variance=0.25), (8, 8))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    output = model(images)
    expected = (output.reconstruction - images).square().mean() / 0.25
    torch.testing.assert_close(output.losses["reconstruction_loss"], expected)
    assert set(output.losses) == {"reconstruction_loss", "commitment_loss"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"codebook_update": "gradient"}, {"gradient": "rotation"}, {"lookup_dim": 8, "l2_normalise": True}],
    ids=["ema", "gradient", "rotation", "normalised look-up"],
)
def test_eight_pictures_are_learned_and_all_codes_put_to_use(settings):
    model, images = tiny(revive_after=20, **settings), pictures()
    model.initialise([images])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = torch.stack(list(model(images).losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update()
        health = model.health(steps_per_epoch=20)
    model.eval()
    error = (model.decode(model.encode(images)) - images).square().mean()
    assert error < 0.01, f"{error:.4f} of {images.var():.4f}, the variance of the pixels"
    assert health["codes_used_share"] > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "model.channels=0, expected at least 1"),
        ({"downsamplings": 0}, "model.downsamplings=0, expected at least 1"),
        ({"residual_blocks": -1}, "model.residual_blocks=-1, expected 0 or more"),
        ({"data_variance": 0.0}, "model.data_variance=0.0, expected above 0"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        VQVAEConfig(**settings)
