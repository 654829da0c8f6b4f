"""Bits above 0, straight through, in grids of at most 16."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from stage1_vq.quantizers.binary import BinaryQuantizer, BinaryQuantizerConfig


def test_exact_small_answer():
    z = torch.tensor([[0.6, -3.0, -0.4, 9.0]]).view(1, 4, 1, 1).requires_grad_()
    quantized = BinaryQuantizer(BinaryQuantizerConfig(dim=4, commitment_weight=0))(z)
    assert quantized.z_q.flatten().tolist() == [1, 0, 0, 1]
    assert quantized.codes[0].item() == 0b1001
    assert quantized.losses == {}
    upstream = torch.randn(1, 4, 1, 1)
    quantized.z_q.backward(upstream)
    assert torch.equal(z.grad, upstream)


def test_the_commitment_loss_pulls_to_minus_1_and_1():
    z = torch.tensor([0.6, -3.0]).view(1, 2, 1, 1).requires_grad_()
    quantized = BinaryQuantizer(BinaryQuantizerConfig(dim=2, commitment_weight=0.5))(z)
    assert quantized.losses["commitment_loss"].item() == pytest.approx(0.5 * (0.4**2 + 2**2) / 2)
    quantized.losses["commitment_loss"].backward()
    torch.testing.assert_close(z.grad.flatten(), 0.5 * torch.tensor([-0.4, -2.0]))


@pytest.mark.parametrize(
    ("dim", "bits_per_code", "vocabularies"),
    [(8, 16, [2**8]), (20, 16, [2**16, 2**4]), (9, 3, [8, 8, 8]), (3, 1, [2, 2, 2])],
)
def test_many_bits_are_several_grids(dim, bits_per_code, vocabularies):
    quantizer = BinaryQuantizer(BinaryQuantizerConfig(dim=dim, bits_per_code=bits_per_code))
    assert [grid.vocabulary for grid in quantizer.grids(2, 3)] == vocabularies
    z = torch.randn(2, dim, 2, 3)
    quantized = quantizer(z)
    assert torch.equal(quantizer.codes_to_latents(quantized.codes), (z > 0).float())
    assert torch.equal(quantizer.codes_to_latents(quantizer.codes(z)), quantized.z_q)
    quantizer.update()
    assert {"perplexity", "codes_used_share"} <= set(quantizer.health(steps_per_epoch=1))


@pytest.mark.parametrize(("dim", "prefix"), [(4, ""), (20, "codes1: ")])
def test_bits_that_never_change_are_warned_of(dim, prefix):
    quantizer = BinaryQuantizer(BinaryQuantizerConfig(dim=dim))
    quantizer(torch.zeros(1, dim, 2, 2))
    quantizer.update()
    health = {name: float(value) for name, value in quantizer.health(steps_per_epoch=1).items()}
    assert quantizer.warnings(health, steps_per_epoch=1)[-1].startswith(f"{prefix}only 6% of 16 codes were used")


@pytest.mark.parametrize("value", [0, 17])
def test_a_config_that_cannot_be_is_refused(value):
    with pytest.raises(UserError, match=f"bits_per_code={value}, expected from 1 to 16"):
        BinaryQuantizerConfig(bits_per_code=value)
