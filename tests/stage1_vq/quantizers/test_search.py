"""The tiled search finds what a brute-force search in float64 finds, and never builds the whole table of scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stage1_vq.quantizers.search import nearest_codes, search_on_cpu, search_on_gpu

SEARCHES = pytest.mark.parametrize("search", [search_on_cpu, search_on_gpu])  # both run on any device
SHAPES = pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 3, 2), (7, 1, 5), (600, 4, 31), (513, 8, 33), (1500, 16, 1000), (70, 5, 40_000), (0, 4, 8)]
)


def random_vectors(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@SEARCHES
@SHAPES
def test_equals_brute_force_except_at_ties_within_rounding(search, n, d, k):
    vectors, codebook = random_vectors(n, d, 0), random_vectors(k, d, 1)
    codes = search(vectors, codebook)
    distances = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    found = distances.gather(1, codes.unsqueeze(1)).squeeze(1)
    assert codes.shape == (n,)
    assert codes.dtype == torch.int64
    assert (found - distances.min(1).values <= 1e-5).all()
    assert (codes == distances.argmin(1)).sum() >= n * 0.999  # ties that close are rare


@SEARCHES
def test_exact_small_answer(search):
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    vectors = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.0, 1.1], [9.0, 9.0], [-1.0, -1.0]])
    assert search(vectors, codebook).tolist() == [0, 1, 2, 2, 0]


@SEARCHES
def test_of_equal_code_vectors_the_lowest_wins(search):
    codebook = random_vectors(8, 4, 0).repeat(20, 1)  # each eight times over, in several blocks
    assert search(codebook, codebook).tolist() == list(range(8)) * 20


@SEARCHES
def test_the_last_code_can_win_though_the_blocks_are_padded_with_copies_of_it(search):
    codebook = random_vectors(33, 4, 0)
    assert search(codebook, codebook).tolist() == list(range(33))


@SEARCHES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_are_not_finite_get_some_valid_code_and_spoil_no_other(search, value):
    vectors, codebook = random_vectors(40, 4, 0), random_vectors(33, 4, 1)
    expected = search(vectors, codebook)
    vectors[7, 2] = value
    codes = search(vectors, codebook)
    assert 0 <= int(codes[7]) < 33
    codes[7] = expected[7]
    assert torch.equal(codes, expected)


def test_a_row_of_the_answer_depends_on_that_vector_only():
    vectors, codebook = random_vectors(700, 16, 0), random_vectors(200, 16, 1)
    together = nearest_codes(vectors, codebook)
    alone = torch.cat([nearest_codes(vector, codebook) for vector in vectors.split(1)])
    assert torch.equal(together, alone)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_table_of_all_scores_never_exists():
    vectors, codebook = random_vectors(4096, 4, 0), random_vectors(8192, 4, 1)
    with LargestTensor() as largest:
        nearest_codes(vectors, codebook)
    assert 0 < largest.elements <= len(vectors) * len(codebook) // 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@SHAPES
def test_a_gpu_finds_the_codes_of_the_cpu(n, d, k):
    vectors, codebook = random_vectors(n, d, 0), random_vectors(k, d, 1)
    codes = nearest_codes(vectors.cuda(), codebook.cuda()).cpu()
    assert (codes == nearest_codes(vectors, codebook)).sum() >= n * 0.999
