"""Tiled soft assignments beside the dense ones that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vq.quantizers import soft_codes
from stage1_vq.quantizers.bits import entropy
from stage1_vq.quantizers.soft_codes import index_backpropagation, soft_statistics
from tests.stage1_vq.quantizers.test_search import LargestTensor

N, K, D = 70, 33, 5
each_tile = pytest.mark.parametrize("tile", [1, 10 * K, 2**20])


@pytest.fixture
def tiled(tile, monkeypatch):
    monkeypatch.setattr(soft_codes, "CPU_TILE", tile)
    monkeypatch.setattr(soft_codes, "CPU_ROWS", 1)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(N, D, generator=generator, dtype=torch.float64)
    codebook = torch.randn(K, D, generator=generator, dtype=torch.float64)
    return vectors.requires_grad_(), codebook.requires_grad_()


@each_tile
@pytest.mark.usefixtures("tiled")
def test_index_backpropagation_has_the_gradients_of_a_one_hot_seen_as_a_softmax():
    (vectors, codebook), (dense_vectors, dense_codebook) = inputs(), inputs()
    upstream = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    codes = (vectors @ codebook.t()).argmax(1)
    found = index_backpropagation(vectors, codebook, codes)
    assert torch.equal(found, codebook[codes])
    found.backward(upstream)

    soft = (dense_vectors @ dense_codebook.t()).softmax(1)
    one_hot = F.one_hot(codes, K) - soft.detach() + soft
    (one_hot @ dense_codebook).backward(upstream)
    torch.testing.assert_close(vectors.grad, dense_vectors.grad)
    torch.testing.assert_close(codebook.grad, dense_codebook.grad)
    assert (codebook.grad.abs().sum(1) > 0).all(), "every code vector learns from every step"
    assert len(codes.unique()) < K, "codes that none of the latents has must be among them"


@each_tile
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("scale", [0.5, 8.0])
def test_entropies_and_gradients_are_those_of_the_dense_table(scale):
    (vectors, codebook), (dense_vectors, dense_codebook) = inputs(), inputs()
    sample_entropy, mean = soft_statistics(vectors, codebook, scale)
    dense = (scale * dense_vectors @ dense_codebook.t()).softmax(1)
    torch.testing.assert_close(sample_entropy, entropy(dense).mean())
    torch.testing.assert_close(mean, dense.mean(0))

    (0.3 * sample_entropy - 0.7 * entropy(mean)).backward()
    (0.3 * entropy(dense).mean() - 0.7 * entropy(dense.mean(0))).backward()
    torch.testing.assert_close(vectors.grad, dense_vectors.grad)
    torch.testing.assert_close(codebook.grad, dense_codebook.grad)


def test_the_table_of_all_latents_by_all_codes_is_never_there(monkeypatch):
    monkeypatch.setattr(soft_codes, "CPU_TILE", 2**14)
    monkeypatch.setattr(soft_codes, "CPU_ROWS", 1)
    vectors, codebook = torch.randn(1000, D, requires_grad=True), torch.randn(2000, D, requires_grad=True)
    with LargestTensor() as largest:
        sample_entropy, mean = soft_statistics(vectors, codebook, 2.0)
        indexed = index_backpropagation(vectors, codebook, torch.arange(1000))
        (indexed.square().mean() + sample_entropy - entropy(mean)).backward()
    assert codebook.grad is not None
    assert 0 < largest.elements <= 2**14
