"""Levels, digits and codes of finite scalar quantization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import fsq
from stage1_vq.quantizers.fsq import FSQConfig, FSQuantizer
from tests.golden import golden_frontier

each_form = pytest.mark.parametrize("symmetric", [False, True])


def line(values: list[list[float]]) -> Tensor:
    """Latents side by side, each a row of `values`: 1 d 1 w."""
    return torch.tensor(values).t()[None, :, None]


def test_exact_small_answer():
    quantizer = FSQuantizer(FSQConfig(levels=(3, 4), dim=2))
    quantized = quantizer(line([[0.0, 0.0], [9.0, -9.0], [-9.0, 9.0]]))
    assert quantized.z_q[0, :, 0].t().tolist() == [[0, 0], [1, -1], [-1, 0.5]]
    # First level fastest: digits (1, 2), (2, 0), (0, 3).
    assert quantized.codes[0].tolist() == [[[1 + 3 * 2, 2, 3 * 3]]]


def test_symmetric_levels_go_evenly_from_minus_1_to_1():
    quantizer = FSQuantizer(FSQConfig(levels=(2, 4), dim=2, preserve_symmetry=True))
    every = quantizer.codes_to_latents((torch.arange(8).view(1, 1, 8),))[0, :, 0]
    torch.testing.assert_close(every[0], torch.tensor([-1.0, 1.0] * 4))
    torch.testing.assert_close(every[1], torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]).repeat_interleave(2))


@each_form
def test_every_level_is_reached_and_every_code_has_a_vector_of_its_own(symmetric):
    levels = (8, 5, 3, 2)
    quantizer = FSQuantizer(FSQConfig(levels=levels, dim=4, preserve_symmetry=symmetric))
    every = torch.arange(240).view(1, 12, 20)
    vectors = quantizer.codes_to_latents((every,))
    assert len(vectors.flatten(2).squeeze(0).t().unique(dim=0)) == 240
    digits = quantizer.digits(quantizer.bounded(torch.linspace(-8, 8, 1000).expand(1, 4, 1, -1)))
    assert [number.unique().tolist() for number in digits[0]] == [list(range(count)) for count in levels]


@each_form
def test_the_gradient_is_that_without_rounding(symmetric):
    quantizer = FSQuantizer(FSQConfig(levels=(8, 5), dim=2, preserve_symmetry=symmetric))
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer(z).z_q.sum().backward()
    smooth = z.detach().clone().requires_grad_()
    quantizer.values(quantizer.bounded(smooth)).sum().backward()
    assert torch.equal(z.grad, smooth.grad)
    assert (quantizer(z).z_q - quantizer.values(quantizer.bounded(z))).abs().max() > 0.05, "it does round"


# ---- images that are not rounded, codes that are drawn anew ---------------------------------------------------------


def some_latents() -> Tensor:
    return torch.randn(400, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def test_of_a_share_of_images_nothing_is_rounded_in_training():
    quantizer, z = FSQuantizer(FSQConfig(levels=(8, 5), dim=2, unrounded=0.3)), some_latents()
    torch.manual_seed(0)
    quantized = quantizer(z)
    bounded, rounded = quantizer.values(quantizer.bounded(z)), quantizer.codes_to_latents(quantized.codes)
    left, right = ((quantized.z_q == each).flatten(1).all(1) for each in (bounded, rounded))
    assert torch.equal(left, ~right)  # an image is one or the other
    assert 0.2 < left.float().mean() < 0.4
    assert torch.equal(quantized.codes[0], quantizer.codes(z)[0])
    assert torch.equal(quantizer.eval()(z).z_q, rounded)


def test_of_each_image_another_share_of_codes_is_drawn_anew_in_training_and_hears_nothing():
    quantizer, z = FSQuantizer(FSQConfig(levels=(8, 5), dim=2, corruption=0.8)), some_latents().requires_grad_()
    torch.manual_seed(0)
    quantized = quantizer(z)
    own = quantizer.codes(z)[0]
    assert torch.equal(quantized.z_q, quantizer.codes_to_latents(quantized.codes))
    quantized.z_q.sum().backward()
    deaf = (z.grad == 0).all(1)
    assert (deaf | (quantized.codes[0] == own)).all()
    shares = deaf.float().mean((1, 2))  # of images
    assert 0.35 < shares.mean() < 0.45
    assert shares.std() > 0.2
    assert len(quantized.codes[0][deaf].unique()) == 40
    assert torch.equal(quantizer.eval()(z).codes[0], own)


@pytest.mark.parametrize(("name", "settings"), [("drop_quant", {"unrounded": 0.5}), ("corrupt", {"corruption": 1.0})])
def test_what_training_leaves_out_is_that_of_flextok(name, settings, monkeypatch: pytest.MonkeyPatch):
    """Whose rate of corruption is recorded (0.4), as are the draws (arXiv:2502.13967)."""
    original = golden_frontier("flextok")
    levels = tuple(original.config["levels"])
    quantizer = FSQuantizer(FSQConfig(levels=levels, dim=3, **settings))
    anew = (original.inputs["fsq_random_indices"].unsqueeze(1) + 0.5) / 160
    draws = {
        "drop_quant": [1 - original.inputs["fsq_bernoulli"].view(2, 1, 1, 1)],
        "corrupt": [torch.full((2, 1, 1, 1), 0.4), anew, original.inputs["fsq_uniform"].view(2, 1, 1, 8)],
    }[name]

    def recorded(*shape: int, device: torch.device) -> Tensor:
        drawn = draws.pop(0)
        assert drawn.shape == shape
        return drawn

    monkeypatch.setattr(fsq, "uniform", recorded)
    z = original.inputs["fsq_z"].mT.unsqueeze(2).requires_grad_()  # b d 1 n
    quantized = quantizer(z)
    assert not draws
    torch.testing.assert_close(quantized.z_q[:, :, 0].mT, original.outputs[f"fsq/{name}/quant"], rtol=1e-5, atol=5e-5)
    if name == "corrupt":
        assert torch.equal(quantized.codes[0][:, 0], original.outputs["fsq/corrupt/tokens"])
    (quantized.z_q[:, :, 0].mT * original.inputs["fsq_cotangent"]).sum().backward()
    torch.testing.assert_close(z.grad[:, :, 0].mT, original.outputs[f"fsq/{name}/grad_z"], rtol=1e-5, atol=5e-5)
    every = quantizer.codes_to_latents((torch.arange(160).view(1, 1, 160),))[0, :, 0].mT
    torch.testing.assert_close(every, original.outputs["fsq/codebook"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ()}, r"levels=\(\), expected numbers of at least 2"),
        ({"levels": (5, 1)}, r"levels=\(5, 1\), expected numbers of at least 2"),
        ({"levels": (16,) * 7}, "expected a product of at most"),
        ({"dim": 0}, "dim=0, expected at least 1"),
        ({"unrounded": 1.5}, "unrounded=1.5, expected a share from 0 to 1"),
        ({"corruption": -0.1}, "corruption=-0.1, expected a share from 0 to 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FSQConfig(**settings)
