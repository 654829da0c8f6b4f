"""The published networks; the loss; any quantizer; wrong configs are refused. More in test_conformance.py, the
published outputs in imports/test_dalle.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import UserError
from stage1_vq.autoencoders.dvae import DVAE, DVAEConfig
from stage1_vq.losses.reconstruction import logit_laplace_nll
from stage1_vq.quantizers import GumbelQuantizerConfig, NearestQuantizerConfig


def test_the_default_network_is_the_published_one():
    with torch.device("meta"):
        model = DVAE(DVAEConfig(), (256, 256))
    assert model.code_spec().describe() == "32x32 codes of 8192 (256x256x3 images)"
    assert isinstance(model.encoder.output, nn.Identity)  # the quantizer's logits come next
    outputs = [[block.convolutions[3].out_channels for block in group] for group in model.encoder.groups]
    assert outputs == [[256, 256], [512, 512], [1024, 1024], [2048, 2048]]
    outputs = [[block.convolutions[3].out_channels for block in group] for group in model.decoder.groups]
    assert outputs == [[2048, 2048], [1024, 1024], [512, 512], [256, 256]]
    assert model.decoder.output.weight.shape == (6, 256, 1, 1)
    assert {block.gain for group in model.encoder.groups for block in group} == {1 / 64}


def test_groups_set_the_stride_and_blocks_the_gain():
    model = DVAE(DVAEConfig(width=4, groups=3, blocks=1, quantizer=NearestQuantizerConfig(dim=6)), (8, 12))
    assert model.stride == 4
    assert model.encoder(torch.rand(1, 3, 8, 12)).shape == (1, 6, 2, 3)
    assert {block.gain for group in model.decoder.groups for block in group} == {1 / 9}


@pytest.mark.parametrize("dim", [16, 7])
def test_a_convolution_leads_to_quantizers_of_another_width(dim):
    quantizer = GumbelQuantizerConfig(codebook_size=9, dim=dim, embedding_dim=5)
    model = DVAE(DVAEConfig(width=8, groups=2, blocks=1, quantizer=quantizer), (8, 8))
    assert isinstance(model.encoder.output, nn.Identity) == (dim == 16)
    z = model.latents(torch.rand(2, 3, 8, 8) * 2 - 1)
    assert z.shape == (2, dim, 4, 4)
    assert (z >= 0).all() == (dim == 16)  # a ReLU comes last


def test_the_reconstruction_loss_is_the_likelihood_per_element_of_mapped_pixels():
    model = DVAE(DVAEConfig(width=8, groups=2, blocks=1, quantizer=NearestQuantizerConfig(dim=4)), (8, 8)).eval()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    decoded = model.decoder(model.quantizer(model.encoder(0.4 * images + 0.5)).z_q)
    expected = logit_laplace_nll(decoded[:, :3], decoded[:, 3:], 0.4 * images + 0.5).mean()
    output = model(images)
    torch.testing.assert_close(output.losses["reconstruction_loss"], expected)
    torch.testing.assert_close(output.reconstruction, (decoded[:, :3].sigmoid() - 0.1) / 0.8 * 2 - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "model.channels=0, expected at least 1"),
        ({"groups": 0}, "model.groups=0, expected at least 1"),
        ({"blocks": 0}, "model.blocks=0, expected at least 1"),
        ({"width": 10}, "model.width=10, expected a multiple of 4"),
        ({"width": 0}, "model.width=0, expected a multiple of 4"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        DVAEConfig(**settings)
