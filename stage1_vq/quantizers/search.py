"""Nearest code vectors, exactly, at about the cost of one matrix product and in a few megabytes.

|x - e|^2 is smallest where x.e - |e|^2 / 2 is largest, and these scores are one matrix product with a bias. The table
of all n x k scores would be larger than any cache (512 MB for 16,384 vectors and 8,192 codes), and a fresh one each
step is paid for in page faults; so the vectors are taken a tile at a time, into one buffer that stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.compatibility import never_compiled
from common.float32 import full_precision

CPU_TILE = 2**20  # scores at a time: 4 MB, of the order of a core's share of the cache
CPU_ROWS = 512  # vectors at a time, at most
BLOCK = 32  # codes whose scores are reduced together
GPU_TILE = 2**24  # scores at a time: 64 MB, enough to fill a GPU


@never_compiled  # the loop would be unrolled into the graph
@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code vector nearest to each vector by Euclidean distance; of equal ones the lowest.

    vectors: n d; codebook: k d, both float32; returns n, int64. Which of two codes wins whose distances differ by less
    than float32 rounding is not defined.
    """
    search = search_on_cpu if vectors.device.type == "cpu" else search_on_gpu
    with full_precision():
        return search(vectors, codebook)


@never_compiled
@torch.no_grad()
def codes_of_largest_product(vectors: Tensor, codebook: Tensor) -> Tensor:
    """As `nearest_codes`, but the code vector whose inner product with the vector is the largest."""
    search = search_on_cpu if vectors.device.type == "cpu" else search_on_gpu
    with full_precision():
        return search(vectors, codebook, codebook.new_zeros(len(codebook)))


def search_on_cpu(vectors: Tensor, codebook: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `nearest_codes`, for the CPU; with `bias`, k, the code of the largest inner product plus bias.

    PyTorch's `argmax` takes several times as long as its `amax`, which is vectorised. So: the maxima of blocks of codes
    by `amax`, the best block by `argmax` over these few, and the code by `argmax` inside that block alone. Scores lie
    codes by vectors: that way the matrix product is fast for narrow code vectors too (3 times as fast at d=8,
    k=16,384), and `amax` runs along whole rows of the buffer.
    """
    n, k = len(vectors), len(codebook)
    bias = codebook.square().sum(1).mul_(-0.5) if bias is None else bias
    if padding := -k % BLOCK:  # copies of the last code never win alone
        codebook = torch.cat([codebook, codebook[-1:].expand(padding, -1)])
        bias = torch.cat([bias, bias[-1:].expand(padding)])
    blocks = len(codebook) // BLOCK
    bias = bias.unsqueeze(1)  # k 1
    rows = max(1, min(n, CPU_ROWS, max(CPU_TILE // len(codebook), 32)))
    buffer = vectors.new_empty(len(codebook) * rows)
    block_maxima = vectors.new_empty(blocks * rows)
    tile_rows = torch.arange(rows)
    codes = torch.empty(n, dtype=torch.int64)
    for tile, found in zip(vectors.split(rows), codes.split(rows), strict=True):
        r = len(tile)
        scores = buffer[: len(codebook) * r].view(len(codebook), r)
        torch.addmm(bias, codebook, tile.t(), out=scores)
        scores = scores.view(blocks, BLOCK, r)
        maxima = torch.amax(scores, 1, out=block_maxima[: blocks * r].view(blocks, r))
        best_block = maxima.t().contiguous().argmax(1)  # r
        inside = scores[best_block, :, tile_rows[:r]].argmax(1)  # r
        torch.add(inside, best_block, alpha=BLOCK, out=found)
    return codes.clamp_(max=k - 1)  # a copy of the last code is the last code


def search_on_gpu(vectors: Tensor, codebook: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `search_on_cpu`, for devices with a fast `argmax`."""
    bias = codebook.square().sum(1).mul_(-0.5) if bias is None else bias  # k
    rows = max(1, min(len(vectors), GPU_TILE // len(codebook)))
    buffer = vectors.new_empty(rows, len(codebook))
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for tile, found in zip(vectors.split(rows), codes.split(rows), strict=True):
        scores = torch.addmm(bias, tile, codebook.t(), out=buffer[: len(tile)])
        torch.argmax(scores, 1, out=found)
    return codes
