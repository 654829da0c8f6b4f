"""Velocities beside a closed form, steps beside a slow loop, and whose codes they are. More in test_conformance.py and
../test_flow_matching.py."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.starting import take_weights
from stage1_vq.autoencoders import VQVAE, FlowDecoder, FlowDecoderConfig, VQGANConfig, VQVAEConfig, flow_decoder
from stage1_vq.autoencoders.flow_decoder import times_of
from stage1_vq.networks import flow_unet
from stage1_vq.networks.flow_unet import FlowFeatures, WindowAttention
from stage1_vq.quantizers import NearestQuantizerConfig
from tests.golden import golden_frontier

QUANTIZER = NearestQuantizerConfig(codebook_size=16, dim=4)
TOKENIZER = VQVAEConfig(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=QUANTIZER)
CONFIG = FlowDecoderConfig(
    width=8,
    multipliers=(1, 2),
    residual_blocks=1,
    transformer_blocks=1,
    heads=2,
    window=1,
    norm_groups=4,
    steps=4,
    tokenizer=TOKENIZER,
)


def tiny(**changes: Any) -> FlowDecoder:
    torch.manual_seed(0)
    return FlowDecoder(replace(CONFIG, **changes), (8, 12)).eval()


def some_images(b: int = 3) -> Tensor:
    return torch.rand(b, 1, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- flow matching --------------------------------------------------------------------------------------------------


class OfGaussians(nn.Module):
    """In a decoder's place, for pixels of mean m and deviation s, each by itself: E[x - e | x_t], in closed form."""

    def __init__(self, mean: float, deviation: float, wrong: float = 0.0) -> None:
        super().__init__()
        self.mean, self.variance, self.wrong = mean, deviation**2, wrong
        self.scale = nn.Parameter(torch.ones(()))

    def trunk(self, x: Tensor, t: Tensor, z_q: Tensor) -> FlowFeatures:
        t = t[:, None, None, None]
        covariance, variance = (1 - t) * self.variance - t, (1 - t) ** 2 * self.variance + t**2
        velocity = self.mean + covariance / variance * (x - (1 - t) * self.mean)
        return FlowFeatures(velocity + self.wrong, z_q)

    def last(self, features: Tensor) -> Tensor:
        return self.scale * features

    def forward(self, x: Tensor, t: Tensor, z_q: Tensor) -> Tensor:
        return self.last(self.trunk(x, t, z_q).last)


def least_loss(deviation: float) -> float:
    """The mean over times, whose logits are normal, of Var(x - e | x_t)."""
    total, weights, s2 = 0.0, 0.0, deviation**2
    for i in range(-4000, 4001):
        logit = i / 500
        t, weight = 1 / (1 + math.exp(-logit)), math.exp(-(logit**2) / 2)
        total += weight * (s2 + 1 - ((1 - t) * s2 - t) ** 2 / ((1 - t) ** 2 * s2 + t**2))
        weights += weight
    return total / weights


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.5), (-0.7, 0.05)])
def test_the_loss_of_the_best_velocity_of_gaussian_pixels_is_its_closed_form(mean: float, deviation: float):
    model = tiny().train()
    images = mean + deviation * torch.randn(3000, 1, 8, 12, generator=torch.Generator().manual_seed(2))
    found = {}
    for wrong in (0.0, 0.1):
        model.decoder = OfGaussians(mean, deviation, wrong)
        torch.manual_seed(3)
        found[wrong] = model(images).losses["flow_loss"]
    assert abs(found[0.0] - least_loss(deviation)) < 0.01 * least_loss(deviation)
    assert abs(found[0.1] - found[0.0] - 0.01) < 0.002  # the mean of squares has the wrong part's own square besides


def test_the_best_velocity_has_no_gradient_and_a_scaled_one_has():
    model = tiny().train()
    images = 0.3 + 0.5 * torch.randn(3000, 1, 8, 12, generator=torch.Generator().manual_seed(2))
    model.decoder = OfGaussians(0.3, 0.5)
    gradients = []
    for scale in (1.0, 0.9, 1.1):
        with torch.no_grad():
            model.decoder.scale.fill_(scale)
        torch.manual_seed(3)
        (gradient,) = torch.autograd.grad(model(images).losses["flow_loss"], [model.decoder.scale])
        gradients.append(float(gradient))
    assert abs(gradients[0]) < 0.02 < -gradients[1]
    assert gradients[2] > 0.02


@torch.no_grad()
def test_many_steps_lead_from_noise_to_the_gaussian():
    model = tiny()
    model.decoder = OfGaussians(0.3, 0.5)
    noise, z_q = torch.randn(500, 1, 8, 12, generator=torch.Generator().manual_seed(4)), torch.zeros(500, 4, 2, 3)
    made = model.walk(noise, z_q, 400)
    torch.testing.assert_close(made, 0.3 + 0.5 * noise, rtol=0, atol=0.02)
    assert (model.walk(noise, z_q, 1) - 0.3).abs().max() < 1e-5  # one step leads to the mean of all images


@torch.no_grad()
def test_steps_are_those_of_eulers_method_at_squares():
    model = tiny()
    noise, z_q = torch.randn(2, 1, 8, 12), torch.randn(2, 4, 2, 3)
    x = noise
    for now, then in ((1.0, 9 / 16), (9 / 16, 1 / 4), (1 / 4, 1 / 16), (1 / 16, 0.0)):
        x = x + (now - then) * model.decoder(x, torch.tensor([now, now]), z_q)
    torch.testing.assert_close(model.walk(noise, z_q, 4), x)
    assert times_of(1) == [1.0, 0.0]


def test_noisy_images_and_times_are_those_of_flextoks_decoder(monkeypatch: pytest.MonkeyPatch):
    """Whose flow matching has the same line, and times of the same distribution (arXiv:2502.13967)."""
    original = golden_frontier("flextok")
    images, noise, logits = (original.inputs[f"flow_{name}"] for name in ("x", "noise", "normal"))
    quantiles = torch.tensor([NormalDist().cdf(float(logit)) for logit in logits])
    monkeypatch.setattr(flow_decoder, "normal_like", lambda _: noise)
    monkeypatch.setattr(flow_decoder, "spread", lambda *_: quantiles)
    given: list[Tensor] = []

    class Recorder(OfGaussians):
        def trunk(self, x: Tensor, t: Tensor, z_q: Tensor) -> FlowFeatures:
            given.extend((x, t))
            return super().trunk(x, t, z_q)

    config = replace(CONFIG, tokenizer=replace(TOKENIZER, channels=3))
    model = FlowDecoder(config, (4, 4)).train()
    model.decoder = Recorder(0.0, 1.0)
    output = model(images)
    torch.testing.assert_close(given[0], original.outputs["flow/ln/noised"], rtol=0, atol=1e-5)
    torch.testing.assert_close(given[1], original.outputs["flow/ln/sigmas"], rtol=0, atol=1e-5)
    found = model.decoder(given[0], given[1], torch.zeros(2, 4, 1, 1))
    torch.testing.assert_close(output.losses["flow_loss"], (found - (images - noise)).square().mean())


def test_in_training_the_reconstruction_is_where_the_velocity_leads_to():
    """For x_t = (1 - t) x + t e and the true velocity x - e, the image itself."""
    model, images = tiny().train(), some_images()

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))  # its type is that of the network

        def trunk(self, x: Tensor, t: Tensor, z_q: Tensor) -> FlowFeatures:
            return FlowFeatures((images - x) / t[:, None, None, None], z_q)

        def last(self, features: Tensor) -> Tensor:
            return features

    model.decoder = Known()
    output = model(images)
    torch.testing.assert_close(output.reconstruction, images)
    assert output.losses["flow_loss"] < 1e-6


def test_the_gradient_of_the_loss_is_that_of_the_squared_error_of_the_velocity():
    model, images = tiny().train(), some_images()
    noise, target = torch.randn_like(images), torch.rand_like(images)
    loss = model(images, noise, target).losses["distillation_loss"]
    weight = model.decoder.conv_out.weight
    (found,) = torch.autograd.grad(loss, [weight])
    z_q = model.quantizer(model.latents(images)).z_q
    slow = (noise + model.decoder(noise, torch.ones(3), z_q) - target).square().mean()
    (expected,) = torch.autograd.grad(slow, [weight])
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(found, expected)


# ---- noise and steps ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_same_codes_become_the_same_image_in_any_batch_and_other_seeds_others():
    model, images = tiny(), some_images(6)
    codes = model.encode(images)
    together = model.decode(codes)
    torch.manual_seed(99)
    for number in range(6):
        torch.testing.assert_close(model.decode((codes[0][number : number + 1],))[0], together[number])
    assert torch.equal(model.decode(codes), together)
    other = tiny(noise_seed=1)
    other.load_state_dict(model.state_dict())
    assert (other.decode(codes) - together).abs().max() > 0.01


@torch.no_grad()
def test_the_number_of_steps_can_be_chosen_and_is_part_of_what_the_model_is(tmp_path):
    model, images = tiny(), some_images()
    codes, before = model.encode(images), model.fingerprint()
    four = model.decode(codes)
    model.decode_in_steps(2)
    two = model.decode(codes)
    assert (two - four).abs().max() > 1e-4
    assert model.fingerprint() != before == model.codes_fingerprint()
    loaded = FlowDecoder.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert loaded.config.steps == 2
    assert torch.equal(loaded.decode(codes), two)
    model.decode_in_steps(4)
    assert torch.equal(model.decode(codes), four)
    with pytest.raises(UserError, match=r"model.steps=0, expected at least 1"):
        model.decode_in_steps(0)
    with pytest.raises(UserError, match="a vqvae model decodes in one pass"):
        VQVAE(TOKENIZER, (8, 8)).decode_in_steps(2)


# ---- the network ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_sees_its_window_with_the_bias_of_each_offset():
    torch.manual_seed(0)
    attention, x = WindowAttention(6, heads=2, window=1), torch.randn(1, 3, 4, 6)
    nn.init.normal_(attention.bias)
    q, k, v = attention.qkv(x).split(6, -1)
    for row in range(3):
        for column in range(4):
            heads = []
            for head in range(2):
                part = slice(3 * head, 3 * head + 3)
                logits, values = [], []
                for r in range(max(0, row - 1), min(3, row + 2)):
                    for c in range(max(0, column - 1), min(4, column + 2)):
                        bias = attention.bias[head, r - row + 1, c - column + 1]
                        logits.append(q[0, row, column, part] @ k[0, r, c, part] / 3**0.5 + bias)
                        values.append(v[0, r, c, part])
                heads.append(torch.stack(logits).softmax(0) @ torch.stack(values))
            expected = attention.output(torch.cat(heads))
            torch.testing.assert_close(attention(x)[0, row, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strip", [1, 8, 13])
def test_attention_in_strips_is_attention(monkeypatch: pytest.MonkeyPatch, strip: int):
    torch.manual_seed(0)
    attention, x = WindowAttention(6, heads=2, window=2), torch.randn(2, 9, 4, 6)
    whole = attention(x)
    (gradient,) = torch.autograd.grad(whole.square().sum(), [attention.bias])
    monkeypatch.setattr(flow_unet, "STRIP", strip)
    parts = attention(x)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), [attention.bias])[0], gradient)


def test_time_noise_and_codes_all_count():
    model = tiny()
    x, z_q = torch.randn(1, 1, 8, 12), torch.randn(1, 4, 2, 3)
    t = torch.tensor([0.5])
    velocity = model.decoder(x, t, z_q)
    for other in ((x + 0.1, t, z_q), (x, t + 0.1, z_q), (x, t, z_q + 0.1)):
        assert (model.decoder(*other) - velocity).abs().max() > 1e-4


def test_the_defaults_are_of_the_size_of_the_papers_smallest():
    with torch.device("meta"):
        model = FlowDecoder(FlowDecoderConfig(), (256, 256))
    assert model.code_spec().describe() == "16x16 codes of 1024 (256x256x3 images)"
    assert 11 < sum(weight.numel() for weight in model.decoder.parameters()) / 1e6 < 16  # the paper: 13.4 million


# ---- from another model ---------------------------------------------------------------------------------------------


def test_encoder_and_codes_are_those_of_the_model_that_it_begins_with():
    torch.manual_seed(5)
    source, model, images = VQVAE(TOKENIZER, (8, 12)).eval(), tiny(), some_images()
    before = model.decoder.conv_in.weight.clone()
    taken = take_weights(model, source)
    assert all(name.startswith(("encoder.", "quantizer.")) for name in taken.kept)
    assert all(name.startswith("decoder.") for name in (*taken.new, *taken.left))
    assert taken.settings == ()
    assert torch.equal(model.encode(images)[0], source.encode(images)[0])
    assert torch.equal(model.decoder.conv_in.weight, before)
    wider = FlowDecoder(replace(CONFIG, tokenizer=replace(TOKENIZER, width=16)), (8, 12))
    assert take_weights(wider, source).settings == ("model.tokenizer.width=16 (was 8)",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "model.steps=0, expected at least 1"),
        ({"window": -1}, "model.window=-1, expected 0 or more"),
        ({"noise_seed": -1}, "model.noise_seed=-1, expected 0 or more"),
        ({"width": 9}, "model.width=9, expected an even number"),
        ({"multipliers": ()}, r"model.multipliers=\(\), expected one or more numbers from 1 up"),
        ({"norm_groups": 3}, "model.norm_groups=3 does not divide model.width=8"),
        ({"heads": 3}, "model.heads=3 does not divide the 16 channels"),
        ({"multipliers": (1, 1, 1, 1)}, "halve the sides 3 times, .* 4 pixels: give at most 3 numbers"),
    ],
)
def test_settings_that_make_no_decoder_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)


def test_a_tokenizer_of_another_stride_has_as_many_levels_as_it_halves():
    config = replace(CONFIG, multipliers=(1, 1, 1, 1, 1), tokenizer=VQGANConfig(width=32))
    assert config.stride == 16
    assert config.channels == 3
