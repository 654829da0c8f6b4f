"""The published sizes; the losses and what the decoder's numbers mean; wrong configs are refused. More in
test_conformance.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from stage1_vq.autoencoders.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from stage1_vq.losses.reconstruction import logit_laplace_nll
from stage1_vq.quantizers import NearestQuantizerConfig

QUANTIZER = NearestQuantizerConfig(codebook_size=16, dim=16, lookup_dim=4, l2_normalise=True)


def tiny(**settings: float) -> ViTVQGAN:
    torch.manual_seed(0)
    return ViTVQGAN(
        ViTVQGANConfig(patch=4, width=16, blocks=1, heads=2, quantizer=QUANTIZER, **settings), (8, 12)
    ).eval()


def test_the_default_network_is_the_papers_base_model():
    with torch.device("meta"):
        model = ViTVQGAN(ViTVQGANConfig(), (256, 256))
    assert model.code_spec().describe() == "32x32 codes of 8192 (256x256x3 images)"
    assert model.quantizer.codebook.shape == (8192, 32)
    for half in (model.encoder, model.decoder):
        block = half.transformer.blocks[0]
        assert len(half.transformer.blocks) == 12
        assert block.attn.num_heads == 12
        assert (block.mlp.fc1.in_features, block.mlp.fc1.out_features) == (768, 3072)


@pytest.mark.parametrize(("cast", "tokens"), [(False, torch.float32), (True, torch.bfloat16)])
def test_tokens_stay_float32_under_autocast_and_follow_a_cast_model(cast: bool, tokens: torch.dtype):
    model, images, seen = tiny(), torch.rand(2, 3, 8, 12) * 2 - 1, []
    if cast:
        model = model.to(torch.bfloat16)
    for half in (model.encoder, model.decoder):
        half.transformer.blocks.register_forward_pre_hook(lambda blocks, x: seen.append(x[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        model.decode(model.encode(images))
    assert seen == [tokens, tokens]


def test_the_decoder_tells_mean_and_scale_of_each_pixel():
    model, images = tiny(), torch.rand(2, 3, 8, 12) * 2 - 1
    decoded = model.decoder(model.quantizer(model.encoder(images)).z_q)
    mean, log_scale = decoded[:, :3], decoded[:, 3:]
    pictures = (mean.sigmoid() - 0.1) / 0.8 * 2 - 1
    output = model(images)
    torch.testing.assert_close(output.reconstruction, pictures)
    nll = logit_laplace_nll(mean, log_scale, 0.4 * images + 0.5).mean()
    torch.testing.assert_close(output.losses["logit_laplace_loss"], 0.1 * nll)
    torch.testing.assert_close(output.losses["l2_loss"], F.mse_loss(pictures, images))


def test_without_the_likelihood_the_decoder_tells_the_pixel_itself():
    model, images = tiny(logit_laplace_weight=0.0, l2_weight=2.0), torch.rand(2, 3, 8, 12) * 2 - 1
    decoded = model.decoder(model.quantizer(model.encoder(images)).z_q)
    assert decoded.shape == images.shape
    output = model(images)
    torch.testing.assert_close(output.reconstruction, decoded)
    torch.testing.assert_close(output.losses["l2_loss"], 2 * F.mse_loss(decoded, images))
    assert set(output.losses) == {"l2_loss", "commitment_loss"}


def test_a_loss_of_weight_zero_is_not_computed():
    assert set(tiny(l2_weight=0.0)(torch.zeros(1, 3, 8, 12)).losses) == {"logit_laplace_loss", "commitment_loss"}


def test_the_last_layer_is_the_one_that_pixels_come_from():
    model = tiny()
    assert model.last_layer() is model.decoder.head[2].weight


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 0}, "model.patch=0, expected at least 1"),
        ({"width": 100}, "model.width=100, expected a multiple of model.heads=12"),
        ({"positions": "rotary"}, "model.positions=rotary, expected learned or sincos"),
        ({"positions": "sincos", "width": 6, "heads": 2}, "model.width=6, expected a multiple of 4"),
        ({"l2_weight": -1.0}, "model.l2_weight=-1.0, expected 0 or more"),
        ({"l2_weight": 0.0, "logit_laplace_weight": 0.0}, "expected one of them above 0"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        ViTVQGANConfig(**settings)
