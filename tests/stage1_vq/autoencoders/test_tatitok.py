"""The published size, what decoder and encoder see, and that text tokens have positions of their own; wrong configs are
refused. More in test_conformance.py and, beside the original, imports/test_titok.py."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from stage1_vq.autoencoders.tatitok import TATiTok, TATiTokConfig
from stage1_vq.quantizers import FSQConfig

SIZES = {f"{half}_{size}": 1 for half in ("encoder", "decoder") for size in ("blocks", "heads")}
SIZES |= {"encoder_width": 16, "decoder_width": 12, "text_length": 3, "text_width": 5, "patch": 4, "tokens": 2}


def tiny() -> TATiTok:
    torch.manual_seed(0)
    return TATiTok(TATiTokConfig(channels=1, quantizer=FSQConfig(levels=(5, 3), dim=2), **SIZES), (8, 12)).eval()


def test_the_default_is_the_published_model_of_32_tokens():
    with torch.device("meta"):
        model = TATiTok(TATiTokConfig(), (256, 256))
    assert model.code_spec().describe() == "1x32 codes of 8192 (256x256x3 images)"
    assert model.captions() == (77, 768, "openai/clip-vit-large-patch14-336")
    assert "reads captions by openai/clip-vit-large-patch14-336" in repr(model)
    assert (len(model.encoder.transformer.blocks), len(model.decoder.transformer.blocks)) == (12, 24)
    assert model.encoder.transformer.token_positions.shape == (32, 768)
    assert model.decoder.transformer.token_positions.shape == (32 + 77, 1024)


@torch.no_grad()
def test_each_pixel_goes_by_each_vector_of_the_caption_and_by_its_place_and_codes_do_not():
    model, text = tiny(), torch.randn(1, 3, 5)
    codes = model.encode(torch.rand(1, 1, 8, 12) * 2 - 1)
    image = model.decode_with_text(codes, text)
    for place in range(3):
        other = text.clone()
        other[0, place] += 1
        assert ((model.decode_with_text(codes, other) - image).abs() > 1e-7).all()
    assert (model.decode_with_text(codes, text.flip(1)) - image).abs().max() > 1e-5


def test_training_learns_to_read_and_leaves_the_empty_caption_as_it_is():
    model = tiny().train()
    model.decoder.no_text.normal_()
    sum(model(torch.rand(2, 1, 8, 12) * 2 - 1).losses.values()).backward()
    assert model.decoder.text.weight.grad.abs().max() > 0
    assert not model.decoder.no_text.requires_grad
    assert "decoder.no_text" in model.state_dict()


def test_fewer_tokens_are_refused():
    with pytest.raises(UserError, match=r"1 tokens, expected 2: .* name a titok or flextok model that was"):
        tiny().prefix_spec(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "model.tokens=0, expected at least 1"),
        ({"text_length": 0}, "model.text_length=0, expected at least 1"),
        ({"text_width": 0}, "model.text_width=0, expected at least 1"),
        ({"decoder_heads": 5}, "model.decoder_width=12, expected a multiple of model.decoder_heads=5"),
        ({"l1_weight": -1.0}, "model.l1_weight=-1.0, expected 0 or more"),
        ({"l2_weight": 0.0}, "model.l1_weight and model.l2_weight are both 0"),
    ],
)
def test_wrong_configs_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TATiTokConfig(**{**SIZES, **settings})
