"""Losses on how latents lie among the code vectors, for codebooks by Euclidean distance.

The table of all n x k distances is never there at once: a tile of rows at a time, and once more in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.compatibility import never_compiled
from stage1_vq.quantizers.soft_codes import tiles


def orthogonality(code_vectors: Tensor) -> Tensor:
    """Mean squared cosine of all pairs of the k code vectors, k d, less the 1 / k that each has with itself (Shin et
    al. 2021, arXiv:2112.00384, equation 2): a scalar, 0 where all of them are orthogonal.

    |E E'|^2 = |E' E|^2, so the matrix is d x d and not k x k.
    """
    unit = F.normalize(code_vectors, dim=1)
    return (unit.t() @ unit).square().sum() / len(unit) ** 2 - 1 / len(unit)


def distances(vectors: Tensor, code_vectors: Tensor) -> Tensor:
    """Euclidean, n k, of vectors n d and code vectors k d; at least 1e-4, where the root still has a slope."""
    squares = vectors.square().sum(1, keepdim=True) + code_vectors.square().sum(1)
    return torch.addmm(squares, vectors, code_vectors.t(), alpha=-2).clamp(min=1e-8).sqrt()


def sum_of_soft_assignments(vectors: Tensor, code_vectors: Tensor, inverse_temperature: float) -> Tensor:
    return (-inverse_temperature * distances(vectors, code_vectors)).softmax(1).sum(0)


def sum_of_cross_entropies(vectors: Tensor, code_vectors: Tensor, codes: Tensor) -> Tensor:
    return F.cross_entropy(-distances(vectors, code_vectors), codes, reduction="sum")


@never_compiled  # the loop would be unrolled into the graph
def mean_soft_assignment(vectors: Tensor, code_vectors: Tensor, inverse_temperature: float) -> Tensor:
    """Mean over n vectors of softmax(minus distance * inverse_temperature): k, the use of each code with a slope."""
    total = vectors.new_zeros(len(code_vectors))
    for rows in tiles(vectors, len(code_vectors)):
        arguments = (vectors[rows], code_vectors, inverse_temperature)
        total = total + checkpoint(sum_of_soft_assignments, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total / len(vectors)


@never_compiled
def cross_entropy_of_codes(vectors: Tensor, code_vectors: Tensor, codes: Tensor) -> Tensor:
    """Mean over n vectors of minus ln softmax(minus distance) of its code, n: nats, a scalar."""
    total = vectors.new_zeros(())
    for rows in tiles(vectors, len(code_vectors)):
        arguments = (vectors[rows], code_vectors, codes[rows])
        total = total + checkpoint(sum_of_cross_entropies, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total / len(vectors)
