"""Bits that are drawn, with the gradient of the mean over all codes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import binary_mapper
from stage1_vq.quantizers.binary_mapper import BinaryMapper, BinaryMapperConfig, expected_vectors
from stage1_vq.quantizers.bits import codes_to_bits


def make(**settings: Any) -> BinaryMapper:
    torch.manual_seed(0)
    return BinaryMapper(BinaryMapperConfig(**{"bits": 4, "dim": 4, "embedding_dim": 3, **settings}))


def latents(b: int = 2) -> Tensor:
    return torch.randn(b, 4, 3, 5, generator=torch.Generator().manual_seed(1))


def dense(logits: Tensor, vectors: Tensor) -> Tensor:
    """The mean over all codes, one by one."""
    every = codes_to_bits(torch.arange(16).view(-1, 1, 1), 4).flatten(1)  # k bits
    total = torch.zeros(len(logits), vectors.shape[1], *logits.shape[2:])
    for bits, vector in zip(every, vectors, strict=True):
        chances = torch.where(bits.view(1, 4, 1, 1), logits.sigmoid(), (-logits).sigmoid()).prod(1, keepdim=True)
        total = total + chances * vector.view(1, -1, 1, 1)
    return total


@pytest.mark.parametrize("tile", [16, 16 * 7, 2**21])
def test_the_mean_over_codes_and_its_gradients_are_those_of_the_sum_over_all(tile, monkeypatch):
    monkeypatch.setattr(binary_mapper, "TILE", tile)
    vectors = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    ours, theirs = latents().requires_grad_(), latents().requires_grad_()
    found, expected = expected_vectors(ours, vectors), dense(theirs, vectors)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_bits_are_drawn_with_their_probabilities(temperature):
    quantizer = make(temperature=temperature, embedding_dim=4)
    with torch.no_grad():  # the vector of a code is its bits
        quantizer.embedding.weight.copy_(codes_to_bits(torch.arange(16).view(-1, 1, 1), 4).flatten(1))
    logits = torch.tensor([-2.0, -0.5, 0.3, 1.5]).view(1, 4, 1, 1)
    torch.manual_seed(1)
    drawn = quantizer(logits.expand(20000, 4, 1, 1)).z_q.flatten(1)
    chances = (logits.flatten() / temperature).sigmoid()
    assert ((drawn.mean(0) - chances).abs() < 4 * (chances * (1 - chances) / 20000).sqrt()).all()


def test_each_vector_learns_from_the_latents_that_drew_it():
    quantizer, z = make(), latents()
    torch.manual_seed(1)
    quantizer(z).z_q.sum().backward()
    counts = quantizer.embedding.weight.grad[:, 0]
    assert counts.sum() == 2 * 3 * 5
    assert torch.equal(counts, counts.round())


def test_a_code_may_say_so_much_before_it_costs():
    z = latents().requires_grad_()
    free, strict = make(free_nats=4 * math.log(2)), make(free_nats=0.0)
    assert free(z).losses["kl_loss"] == 0
    quantized = strict(z)
    torch.testing.assert_close(quantized.losses["kl_loss"], quantized.statistics["kl"])
    p = z.detach().sigmoid()
    expected = (math.log(2) + p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(quantized.statistics["kl"], expected)
    quantized.losses["kl_loss"].backward()
    assert (z.grad * z.detach() >= 0).all(), "it pulls all logits to 0"
    assert not make(kl_weight=0.0)(z).losses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 17}, "bits=17, expected from 1 to 16"),
        ({"temperature": 0.0}, "temperature=0.0, expected above 0"),
        ({"free_nats": -1.0}, "free_nats=-1.0, expected 0 or more"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
