"""The published sizes; that codes are a row of tokens without places; nested dropout, and what is decoded of the first
tokens; wrong configs are refused. More in test_conformance.py."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from common.errors import UserError
from stage1_vq.autoencoders.titok import TiTok, TiTokConfig, kept_tokens
from stage1_vq.quantizers import FSQConfig, MultiscaleQuantizerConfig, NearestQuantizerConfig
from tests.stage1_vq.tiny import make_autoencoder

SIZES = {f"{half}_{size}": 1 for half in ("encoder", "decoder") for size in ("blocks", "heads")}
SIZES |= {"encoder_width": 16, "decoder_width": 12}


def tiny(nested: Any = None, tokens: int = 6, image_size: tuple[int, int] = (8, 12), **settings: Any) -> TiTok:
    torch.manual_seed(0)
    quantizer = FSQConfig(levels=(5, 3), dim=2)
    config = TiTokConfig(channels=1, patch=4, tokens=tokens, nested=nested, quantizer=quantizer, **SIZES, **settings)
    return TiTok(config, image_size)


def test_the_default_is_the_papers_small_model_of_128_tokens():
    with torch.device("meta"):
        model = TiTok(TiTokConfig(), (256, 256))
    assert model.code_spec().describe() == "1x128 codes of 4096 (256x256x3 images)"
    assert model.quantizer.codebook.shape == (4096, 12)
    for half in (model.encoder, model.decoder):
        assert half.transformer.positions.shape == (257, 512)
        assert half.transformer.token_positions.shape == (128, 512)
        assert len(half.transformer.blocks) == 8
        assert half.transformer.blocks[0].attn.num_heads == 8
        assert half.transformer.blocks[0].norm1.eps == half.transformer.norm_after.eps == 1e-5


@torch.no_grad()
def test_each_token_tells_of_the_whole_image_and_each_pixel_comes_of_all_tokens():
    model, images = tiny().eval(), torch.rand(1, 1, 8, 12) * 2 - 1
    for row, column in ((0, 0), (7, 11)):
        other = images.clone()
        other[0, 0, row, column] += 1
        moved = (model.latents(other) - model.latents(images)).abs().amax(dim=(0, 1, 2))  # n
        assert (moved > 1e-6).all()
    codes = model.encode(images)
    for token in range(6):
        changed = codes[0].clone()
        changed[..., token] = (changed[..., token] + 1) % 15
        assert ((model.decoded((changed,)) - model.decoded(codes)).abs() > 1e-7).all()


# ---- nested dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nested", "tokens", "counts"),
    [
        ("powers-of-two", 8, [1, 2, 4]),
        ("powers-of-two", 9, [1, 2, 4, 8]),
        ("powers-of-two", 2, [1]),
        ("uniform", 6, [1, 2, 3, 4, 5]),
    ],
)
def test_each_number_of_tokens_is_as_likely(nested, tokens, counts):
    uniforms = (torch.arange(1200) + 0.5) / 1200
    kept = Counter(kept_tokens(nested, uniforms, tokens).tolist())
    assert kept == dict.fromkeys(counts, 1200 // len(counts))
    ends = kept_tokens(nested, torch.tensor([0.0, 1 - 2**-24]), tokens)
    assert ends.tolist() == [1, counts[-1]]


def test_training_decodes_all_tokens_and_a_beginning_of_each_images():
    """What the draw leaves of an image is what a slow way, one image at a time, decodes of so many."""
    model, images = tiny("uniform", nested_share=0.3).train(), torch.rand(40, 1, 8, 12) * 2 - 1
    with torch.no_grad():
        torch.manual_seed(5)
        output = model(images)
        torch.manual_seed(5)
        kept = kept_tokens("uniform", torch.rand(40), 6)
        assert set(kept.tolist()) == {1, 2, 3, 4, 5}
        codes = model.eval().encode(images)[0]
        whole = model.decoded((codes,))
        parts = [model.decoded((codes[number : number + 1, :, :n],)) for number, n in enumerate(kept.tolist())]
    torch.testing.assert_close(output.reconstruction, whole)
    torch.testing.assert_close(output.losses["reconstruction_loss"], 0.7 * (whole - images).square().mean())
    expected = 0.3 * (torch.cat(parts) - images).square().mean()
    torch.testing.assert_close(output.losses["nested_reconstruction_loss"], expected)
    assert set(model(images).losses) == {"reconstruction_loss"}  # no draw in validations


def test_of_tokens_that_were_dropped_no_gradient_comes():
    model, z_q = tiny("powers-of-two").train(), torch.randn(30, 2, 1, 6, requires_grad=True)
    kept = kept_tokens("powers-of-two", torch.rand(30), 6)
    model.decoder.last(model.decoder.trunk(z_q, kept)).square().sum().backward()
    learned = z_q.grad.abs().sum(dim=(1, 2)) > 0  # b n
    assert torch.equal(learned, torch.arange(6) < kept[:, None])


@torch.no_grad()
def test_validation_and_decoding_have_all_tokens_and_draw_nothing():
    model, images = tiny("powers-of-two").eval(), torch.rand(4, 1, 8, 12) * 2 - 1
    state = torch.get_rng_state()
    torch.testing.assert_close(model(images).reconstruction.clamp(-1, 1), model.decode(model.encode(images)))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_any_beginning_decodes_and_goes_by_its_tokens_alone():
    model = make_autoencoder("titok, grey, nested, residual").eval()
    images = torch.rand(3, 1, 16, 24) * 2 - 1
    codes = model.encode(images)
    pictures = []
    for count in range(1, model.config.tokens + 1):
        first = tuple(grid[..., :count] for grid in codes)
        model.prefix_spec(count).check(first)
        pictures.append(model.decode(first))
        assert pictures[-1].shape == images.shape
    assert torch.equal(pictures[-1], model.decode(codes))
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.pairwise(pictures))


@pytest.mark.parametrize("count", [0, 7])
def test_a_number_of_tokens_that_there_is_not_is_refused(count):
    model = tiny("uniform")
    with pytest.raises(UserError, match=f"{count} tokens, expected 1 to 6, which this model has"):
        model.prefix_spec(count)
    with pytest.raises(UserError, match=f"grid 'codes' has shape \\(1, {count}\\), expected 1x6"):
        model.decode((torch.zeros(1, 1, count, dtype=torch.int64),))


def test_a_model_that_was_not_trained_for_it_decodes_all_tokens_alone():
    model = tiny()
    with pytest.raises(UserError, match=r"3 tokens, expected 6: .* model.nested=powers-of-two in training"):
        model.prefix_spec(3)
    assert model.prefix_spec(6) == model.code_spec()
    with pytest.raises(UserError, match=r"grid 'codes' has shape \(1, 3\), expected 1x6"):
        model.decode((torch.zeros(1, 1, 3, dtype=torch.int64),))
    with pytest.raises(UserError, match="the codes of a vqvae model are all of use"):
        make_autoencoder("vqvae").prefix_spec(3)


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 0}, "model.patch=0, expected at least 1"),
        ({"tokens": 0}, "model.tokens=0, expected at least 1"),
        ({"decoder_blocks": 0}, "model.decoder_blocks=0, expected at least 1"),
        ({"encoder_width": 100}, "model.encoder_width=100, expected a multiple of model.encoder_heads=8"),
        ({"nested": "uniform", "tokens": 1}, "model.nested=uniform with model.tokens=1, expected 2 or more to nest"),
        ({"nested": "halves"}, "model.nested=halves, expected powers-of-two, uniform, or null for none"),
        ({"nested_share": 1.0}, "model.nested_share=1.0, expected a share between 0 and 1"),
        ({"l2_weight": -1.0}, "model.l2_weight=-1.0, expected 0 or more"),
        ({"l2_weight": 0.0}, "model.l1_weight and model.l2_weight are both 0"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        TiTokConfig(**settings)


def test_a_quantizer_with_scales_is_refused():
    quantizer = MultiscaleQuantizerConfig(scales=(1, 2), codebook_size=8, dim=4, phis=2)
    config = TiTokConfig(channels=1, patch=4, tokens=4, quantizer=quantizer, **SIZES)
    with pytest.raises(UserError, match="expected a code for each: take a quantizer without scales"):
        TiTok(config, (8, 8))


def test_the_codebook_learns_of_all_tokens_whatever_is_dropped():
    """The quantizer's losses are of every token: which are dropped is the decoder's matter."""
    quantizer = NearestQuantizerConfig(codebook_size=8, dim=4, codebook_update="gradient")
    torch.manual_seed(0)
    model = TiTok(
        TiTokConfig(channels=1, patch=4, tokens=5, nested="powers-of-two", quantizer=quantizer, **SIZES), (8, 8)
    )
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    z = model.latents(images)
    losses = model(images).losses
    expected = model.quantizer(z).losses
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
