"""Levels, digits and codes of finite scalar quantization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers.fsq import FSQConfig, FSQuantizer

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ()}, r"levels=\(\), expected numbers of at least 2"),
        ({"levels": (5, 1)}, r"levels=\(5, 1\), expected numbers of at least 2"),
        ({"levels": (16,) * 7}, "expected a product of at most"),
        ({"dim": 0}, "dim=0, expected at least 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FSQConfig(**settings)
