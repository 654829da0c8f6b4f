"""Soft assignments of latents to codes, softmax(scale * z . e) over the codebook, and their exact gradients.

The table of all n x k probabilities would be 64 GB for 65,536 latents and 262,144 codes: it is computed a tile of rows
at a time, and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.compatibility import never_compiled

CPU_TILE = 2**20  # probabilities at a time: 4 MB, of the order of a core's share of the cache
GPU_TILE = 2**24
CPU_ROWS = 16  # vectors at a time, at least


def tiles(vectors: Tensor, k: int) -> Iterator[slice]:
    """The rows of n d in portions whose n x k probabilities are few enough."""
    rows = max(CPU_ROWS, CPU_TILE // k) if vectors.device.type == "cpu" else max(1, GPU_TILE // k)
    for start in range(0, len(vectors), rows):
        yield slice(start, start + rows)


def log_softmax_of(vectors: Tensor, codebook: Tensor, scale: float) -> Tensor:
    """Logarithms of the soft assignment: n d, k d to n k."""
    return torch.mm(vectors, codebook.t()).mul_(scale).log_softmax(1)


def softmax_gradients(
    vectors: Tensor, codebook: Tensor, scale: float, of_probabilities: Callable[[slice, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of a loss to the vectors, n d, and to the codebook, k d.

    `of_probabilities(rows, log_probabilities)` is its gradient to the probabilities of these rows, a new r k tensor, up
    to a number for each row: the softmax takes no notice of it.
    """
    to_vectors, to_codebook = torch.empty_like(vectors), torch.zeros_like(codebook)
    for rows in tiles(vectors, len(codebook)):
        log_probabilities = log_softmax_of(vectors[rows], codebook, scale)
        gradient = of_probabilities(rows, log_probabilities)
        probabilities = log_probabilities.exp_()
        gradient.sub_((probabilities * gradient).sum(1, keepdim=True)).mul_(probabilities)  # to the logits
        torch.mm(gradient, codebook, out=to_vectors[rows])
        to_codebook.addmm_(gradient.t(), vectors[rows])
    return to_vectors.mul_(scale), to_codebook.mul_(scale)


class IndexBackpropagation(torch.autograd.Function):
    """The code vectors codebook[codes], n d, with the gradient of (one-hot of the code, seen as the softmax of z . e in
    the backward pass) times the codebook (Shi et al. 2024, arXiv:2412.02692): it reaches each vector and, through its
    probability, each code vector."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, codebook, codes)
        return codebook[codes]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors, codebook, codes = ctx.saved_tensors
        grad = grad.contiguous()
        to_vectors, to_codebook = softmax_gradients(
            vectors, codebook, 1.0, lambda rows, _: torch.mm(grad[rows], codebook.t())
        )
        return to_vectors, to_codebook.index_add_(0, codes, grad), None


@never_compiled  # the loop would be unrolled into the graph
def index_backpropagation(vectors: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """`IndexBackpropagation` of vectors n d and codebook k d, both float32, and codes n."""
    return IndexBackpropagation.apply(vectors, codebook, codes)


class SoftStatistics(torch.autograd.Function):
    """Of the soft assignments of n vectors: the mean entropy in nats, a scalar, and the mean probabilities, k."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codebook: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(vectors, codebook)
        ctx.scale = scale
        entropies, probability_sums = vectors.new_zeros(()), vectors.new_zeros(len(codebook))
        for rows in tiles(vectors, len(codebook)):
            log_probabilities = log_softmax_of(vectors[rows], codebook, scale)
            probabilities = log_probabilities.exp()
            probability_sums += probabilities.sum(0)
            entropies -= log_probabilities.mul_(probabilities).sum()
        return entropies / len(vectors), probability_sums / len(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_entropy: Tensor, to_mean: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors, codebook = ctx.saved_tensors
        to_entropy, to_mean = to_entropy / len(vectors), to_mean / len(vectors)

        def of_probabilities(rows: slice, log_probabilities: Tensor) -> Tensor:
            return log_probabilities.mul(-to_entropy).add_(to_mean)  # -(log p + 1), and 1 is the same for the row

        return *softmax_gradients(vectors, codebook, ctx.scale, of_probabilities), None


@never_compiled
def soft_statistics(vectors: Tensor, codebook: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`SoftStatistics` of vectors n d and codebook k d, both float32."""
    return SoftStatistics.apply(vectors, codebook, scale)
