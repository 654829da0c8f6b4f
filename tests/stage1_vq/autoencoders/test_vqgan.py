"""The published network and loss; it learns; wrong configs are refused. More in test_conformance.py, and against the
original implementations in test_import_golden.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.errors import UserError
from stage1_vq.autoencoders.vqgan import VQGAN, VQGANConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from tests.stage1_vq.autoencoders.test_vqvae import pictures


def tiny(**settings: Any) -> VQGAN:
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=64, dim=8, codebook_update="gradient", revive_after=20)
    sizes = {"width": 16, "multipliers": (1, 1, 2), "residual_blocks": 1, "attention_levels": (2,), "norm_groups": 4}
    return VQGAN(VQGANConfig(**{**sizes, "z_channels": 8, "quantizer": quantizer, **settings}), (16, 16))


def test_the_default_network_is_the_papers():
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(), (256, 256))
    assert model.code_spec().describe() == "16x16 codes of 1024 (256x256x3 images)"
    assert model.quantizer.codebook.shape == (1024, 256)
    assert isinstance(model.quantizer.codebook, torch.nn.Parameter)
    assert model.config.quantizer.commitment_weight == 0.25


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 2.0), (0.5, 0.25)])
def test_the_reconstruction_loss_weighs_absolute_and_squared_error(weights):
    model = tiny(l1_weight=weights[0], l2_weight=weights[1])
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(images)
    error = output.reconstruction - images
    expected = weights[0] * error.abs().mean() + weights[1] * error.square().mean()
    torch.testing.assert_close(output.losses["reconstruction_loss"], expected)
    assert set(output.losses) == {"reconstruction_loss", "commitment_loss", "codebook_loss"}


@pytest.mark.parametrize("spatial_norm", [False, True])
def test_images_come_out_of_the_last_layer(spatial_norm):
    model = tiny(spatial_norm=spatial_norm)
    with torch.no_grad():
        model.last_layer().zero_()
    reconstruction = model(torch.randn(1, 3, 16, 16)).reconstruction
    bias = model.decoder.body.conv_out.bias
    torch.testing.assert_close(reconstruction, bias.view(1, 3, 1, 1).expand(1, 3, 16, 16))


def test_with_a_wider_kernel_around_the_quantizer_codes_keep_their_grid():
    model = tiny(quant_conv_kernel=3).eval()
    assert model.encoder.quant_conv.kernel_size == model.decoder.post_quant_conv.kernel_size == (3, 3)
    (codes,) = model.encode(torch.randn(1, 3, 16, 24))
    assert codes.shape == (1, 4, 6)
    assert model.decode((codes,)).shape == (1, 3, 16, 24)


def test_eight_pictures_are_learned():
    quantizer = NearestQuantizerConfig(codebook_size=64, dim=8, revive_after=20)
    model, images = tiny(width=8, multipliers=(1, 2), attention_levels=(), quantizer=quantizer), pictures()
    model.initialise([images])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(100):
        loss = torch.stack(list(model(images).losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update()
    model.eval()
    error = (model.decode(model.encode(images)) - images).square().mean()
    assert error < 0.05, f"{error:.4f} of {images.var():.4f}, the variance of the pixels"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "model.channels=0, expected at least 1"),
        ({"multipliers": ()}, r"model.multipliers=\(\), expected one or more numbers from 1 up"),
        ({"multipliers": (1, 0)}, r"model.multipliers=\(1, 0\), expected one or more numbers from 1 up"),
        ({"residual_blocks": 0}, "model.residual_blocks=0, expected at least 1"),
        (
            {"attention_levels": (3,)},
            r"model.attention_levels=\(3,\), expected levels from 0 to 2, as there are 3 mult",
        ),
        ({"quant_conv_kernel": 2}, "model.quant_conv_kernel=2, expected an odd number"),
        ({"l1_weight": -1.0}, "model.l1_weight=-1.0, expected 0 or more"),
        ({"l1_weight": 0.0}, "model.l1_weight and model.l2_weight are both 0"),
        ({"norm_groups": 3}, "model.norm_groups=3 does not divide 16 channels"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)
