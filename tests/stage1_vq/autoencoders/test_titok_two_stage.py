"""What the encoder and the decoder are made of, beside slow references; wrong configs and sizes are refused. More in
test_conformance.py and, beside the original, imports/test_titok.py."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from stage1_vq.autoencoders.titok_two_stage import TwoStageTiTok, TwoStageTiTokConfig
from stage1_vq.quantizers import MultiscaleQuantizerConfig, NearestQuantizerConfig, QuantizerConfig

SIZES = {f"{half}_{size}": number for half in ("encoder", "decoder") for size, number in (("width", 8), ("blocks", 1))}
TINY = {
    **SIZES,
    "encoder_heads": 2,
    "decoder_heads": 2,
    "tokens": 3,
    "pixel_codebook_size": 5,
    "pixel_dim": 4,
    "pixel_width": 4,
    "pixel_multipliers": (1, 2),
    "pixel_residual_blocks": 1,
    "norm_groups": 2,
}


def tiny(quantizer: QuantizerConfig | None = None) -> TwoStageTiTok:
    torch.manual_seed(0)
    quantizer = quantizer or NearestQuantizerConfig(codebook_size=16, dim=6, l2_normalise=True)
    return TwoStageTiTok(TwoStageTiTokConfig(**TINY, quantizer=quantizer), (4, 8)).eval()


@torch.no_grad()
def test_each_latent_is_of_every_third_number_of_all_tokens_in_a_row():
    model, seen = tiny(), []
    model.encoder.transformer.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[1]))
    z = model.latents(torch.rand(2, 3, 4, 8) * 2 - 1)
    assert z.shape == (2, 6, 1, 3)
    for image in range(2):
        row = seen[0][image].flatten()  # of 3 tokens of 8 numbers
        for place in range(3):
            expected = model.encoder.output(row[place::3])
            torch.testing.assert_close(z[image, :, 0, place], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_patch_is_the_mean_of_the_entries_by_their_probabilities():
    model = tiny()
    z_q = torch.randn(2, 6, 1, 3)
    logits, mixture = model.decoder.logits(z_q), model.decoder.mixture(z_q)
    assert (logits.shape, mixture.shape) == ((2, 5, 2, 4), (2, 4, 2, 4))
    for row in range(2):
        for column in range(4):
            shares = logits[1, :, row, column].exp() / logits[1, :, row, column].exp().sum()
            expected = sum(share * entry for share, entry in zip(shares, model.decoder.codebook, strict=True))
            torch.testing.assert_close(mixture[1, :, row, column], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.decoder(z_q), model.decoder.pixels(mixture), rtol=1e-5, atol=1e-5)


def test_another_size_and_fewer_tokens_are_refused():
    model = tiny()
    with pytest.raises(UserError, match="8x8 images, expected 4x8: the tokens of this model are of images of that"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="2 tokens, expected 3: this model was trained with all of them alone"):
        model.prefix_spec(2)
    assert model.prefix_spec(3) == model.code_spec()


def test_a_quantizer_with_scales_is_refused():
    quantizer = MultiscaleQuantizerConfig(codebook_size=8, dim=6, scales=(1, 2), phis=2)
    with pytest.raises(UserError, match="expected a code for each: take a quantizer without scales"):
        tiny(quantizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "model.tokens=0, expected at least 1"),
        ({"pixel_dim": 0}, "model.pixel_dim=0, expected at least 1"),
        ({"encoder_heads": 3}, "model.encoder_width=8, expected a multiple of model.encoder_heads=3"),
        ({"pixel_multipliers": ()}, r"model.pixel_multipliers=\(\), expected one or more numbers from 1 up"),
        ({"norm_groups": 3}, "model.norm_groups=3 does not divide model.pixel_width=4"),
        ({"l1_weight": -1}, "model.l1_weight=-1, expected 0 or more"),
        ({"l2_weight": 0}, "model.l1_weight and model.l2_weight are both 0"),
    ],
)
def test_wrong_configs_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TwoStageTiTokConfig(**{**TINY, **settings})
