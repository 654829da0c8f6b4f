"""Bits and their entropies beside dense tables over all codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage1_vq.quantizers import bits
from stage1_vq.quantizers.bits import (
    bit_entropy,
    bits_to_codes,
    codes_to_bits,
    entropy,
    joint_probabilities,
    mean_joint_probabilities,
)
from tests.stage1_vq.quantizers.test_search import LargestTensor


def logits(n: int = 50, width: int = 7, scale: float = 3) -> Tensor:
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dense_probabilities(logits: Tensor) -> Tensor:
    """n 2**bits: softmax over all codes of the inner product of half the logits and a corner of -1 and 1."""
    width = logits.shape[1]
    every = codes_to_bits(torch.arange(2**width).view(-1, 1, 1), width).view(-1, width)
    return (logits / 2 @ (2 * every.to(logits.dtype) - 1).t()).softmax(1)


def test_the_first_bit_is_the_most_significant():
    assert bits_to_codes(torch.tensor([True, False, False]).view(1, 3, 1, 1)).tolist() == [[[4]]]
    assert codes_to_bits(torch.tensor([[[6]]]), 3).flatten().tolist() == [True, True, False]


def test_codes_and_bits_are_inverse():
    codes = torch.arange(2**9).view(2, 16, 16)
    assert torch.equal(bits_to_codes(codes_to_bits(codes, 9)), codes)


def test_bits_are_independent_under_a_softmax_over_corners():
    dense = dense_probabilities(logits())
    torch.testing.assert_close(joint_probabilities(logits()), dense)
    torch.testing.assert_close(bit_entropy(logits()).sum(1), entropy(dense))


@pytest.mark.parametrize("width", [1, 2, 7, 8])
@pytest.mark.parametrize("tile", [1, 64, bits.TILE])
def test_the_mean_and_its_gradient_are_those_of_the_dense_table(width, tile, monkeypatch):
    monkeypatch.setattr(bits, "TILE", tile)
    ours, dense = logits(width=width).requires_grad_(), logits(width=width).requires_grad_()
    found, expected = mean_joint_probabilities(ours), dense_probabilities(dense).mean(0)
    torch.testing.assert_close(found, expected)
    entropy(found).backward()
    entropy(expected).backward()
    torch.testing.assert_close(ours.grad, dense.grad)


def test_certain_bits_have_entropy_0_and_finite_gradients():
    certain = torch.tensor([[1000.0, -1000.0], [800.0, -900.0]], requires_grad=True)
    assert bit_entropy(certain).sum() == 0
    found = entropy(mean_joint_probabilities(certain))
    assert found == 0
    (found + bit_entropy(certain).sum()).backward()
    assert certain.grad.isfinite().all()


def test_the_table_of_all_latents_by_all_codes_is_never_there(monkeypatch):
    monkeypatch.setattr(bits, "TILE", 2**10)
    n, width = 3000, 12
    with LargestTensor() as largest:
        entropy(mean_joint_probabilities(logits(n, width).requires_grad_())).backward()
    assert 0 < largest.elements <= max(2**width, 2 * 2**10, n * width)
