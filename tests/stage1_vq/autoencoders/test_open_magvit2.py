"""The published size; norms that see the codes, and places out of channels, beside slow references; wrong configs are
refused. More in test_conformance.py and, beside the original, imports/test_frontier.py."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from stage1_vq.autoencoders.open_magvit2 import AdaptiveGroupNorm, OpenMAGVIT2, OpenMAGVIT2Config, Upsample
from stage1_vq.quantizers import LFQConfig


def tiny() -> OpenMAGVIT2:
    torch.manual_seed(0)
    quantizer = LFQConfig(bits=4, dim=4, entropy_bits=4)
    config = OpenMAGVIT2Config(width=8, multipliers=(1, 2), residual_blocks=1, norm_groups=4, quantizer=quantizer)
    return OpenMAGVIT2(config, (8, 12)).eval()


def test_the_defaults_are_the_published_model():
    with torch.device("meta"):
        model = OpenMAGVIT2(OpenMAGVIT2Config(), (256, 256))
    assert model.code_spec().describe() == "16x16 codes of 262144 (256x256x3 images)"
    weights = sum(weight.numel() for weight in model.parameters())
    assert round(weights / 1e6) == 115


@torch.no_grad()
def test_adaptive_norms_scale_by_the_deviation_of_the_codes_and_shift_by_their_mean():
    torch.manual_seed(1)
    norm, x, z_q = AdaptiveGroupNorm(6, 2, 3), torch.randn(2, 6, 4, 8), torch.randn(2, 3, 2, 4)
    found = norm(x, z_q)
    for image in range(2):
        groups = x[image].reshape(2, -1)
        normed = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        vectors = z_q[image].reshape(3, -1)
        squares = (vectors - vectors.mean(1, keepdim=True)).square().sum(1) / 7
        scale = norm.gamma.weight @ (squares + 1e-6).sqrt() + norm.gamma.bias
        shift = norm.beta.weight @ vectors.mean(1) + norm.beta.bias
        expected = normed.reshape(6, 4, 8) * scale.view(6, 1, 1) + shift.view(6, 1, 1)
        torch.testing.assert_close(found[image], expected, rtol=1e-5, atol=1e-5)


def test_an_image_of_one_code_has_an_image_and_gradients():
    model = tiny().train()
    output = model(torch.rand(2, 3, 2, 2) * 2 - 1)
    assert output.codes[0].shape == (2, 1, 1)
    sum(output.losses.values()).backward()
    assert output.reconstruction.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@torch.no_grad()
def test_the_four_parts_of_the_channels_go_to_the_four_places_in_turn():
    torch.manual_seed(2)
    upsample, x = Upsample(3), torch.randn(2, 3, 4, 5)
    found, parts = upsample(x), upsample.conv1(x).chunk(4, 1)
    for part, (row, column) in zip(parts, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        assert torch.equal(found[:, :, row::2, column::2], part)


@torch.no_grad()
def test_the_decoder_sees_all_codes_at_every_place():
    """Through its adaptive norms, far beyond what convolutions reach."""
    model = tiny()
    codes = torch.zeros(1, 64, 64, dtype=torch.long)
    other = codes.clone()
    other[0, 0, 0] = 15
    before, after = model.decode((codes,)), model.decode((other,))
    assert not torch.equal(before[..., -1, -1], after[..., -1, -1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "model.channels=0, expected at least 1"),
        ({"width": 0}, "model.width=0, expected at least 1"),
        ({"multipliers": ()}, r"model.multipliers=\(\), expected one or more numbers from 1 up"),
        ({"multipliers": (1, 0)}, r"model.multipliers=\(1, 0\), expected one or more numbers from 1 up"),
        ({"residual_blocks": 0}, "model.residual_blocks=0, expected at least 1"),
        ({"norm_groups": 0}, "model.norm_groups=0, expected at least 1"),
        ({"norm_groups": 48}, "model.norm_groups=48 does not divide model.width=128"),
        ({"l1_weight": -1}, "model.l1_weight=-1, expected 0 or more"),
        ({"l2_weight": -1}, "model.l2_weight=-1, expected 0 or more"),
        ({"l1_weight": 0}, "model.l1_weight and model.l2_weight are both 0"),
    ],
)
def test_wrong_configs_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        OpenMAGVIT2Config(**settings)
