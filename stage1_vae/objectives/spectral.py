"""Spectral regularisation: the sum of the largest singular values of weights, kept up to date by power iteration
(Yoshida and Miyato 2017, arXiv:1705.10941; Vahdat and Kautz 2020, arXiv:2007.03898, section 3.2), and the scales of
batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST_ITERATIONS = 40  # from random vectors, in the first step of a run
ITERATIONS = 4  # from those of the step before; one is enough, as the paper says: weights hardly move in a step


class Regularised(NamedTuple):
    """What a model has to be kept small, with gradients."""

    matrices: Sequence[Tensor]  # o i each: weights as images meet them, of all output channels and their inputs
    gains: Sequence[Tensor]  # c each: scales of batch norms


class SpectralNorms(nn.Module):
    """The largest singular value of each of some matrices, by vectors that are kept from step to step."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        """matrices: of the shapes that it will be given, in their order."""
        super().__init__()
        self.places = of_one_shape(matrices)
        for number, places in enumerate(self.places):  # those of one shape are worked on together
            rows, columns = matrices[places[0]].shape
            self.register_buffer(f"left_{number}", normalised(torch.randn(len(places), rows)))
            # Made anew of the left ones by every iteration, of which each step of a run has one at least.
            self.register_buffer(f"right_{number}", torch.zeros(len(places), columns), persistent=False)

    def forward(self, matrices: Sequence[Tensor], iterations: int) -> Tensor:
        """The sum of u^T W v over matrices W, a scalar, after so many power iterations from the vectors u and v that
        were kept. Once these are singular vectors, its gradient is that of the singular values."""
        with torch.autocast(matrices[0].device.type, enabled=False):
            sums = [
                largest(
                    torch.stack([matrices[place] for place in places]).float(),
                    self.get_buffer(f"left_{number}"),
                    self.get_buffer(f"right_{number}"),
                    iterations,
                )
                for number, places in enumerate(self.places)
            ]
            return torch.stack(sums).sum()


def largest(weights: Tensor, left: Tensor, right: Tensor, iterations: int) -> Tensor:
    """The sum of u^T W v, a scalar, of n o i weights. left, right: n o and n i, u and v, which iterations change."""
    with torch.no_grad():
        for _ in range(iterations):
            right.copy_(normalised(torch.einsum("no,noi->ni", left, weights)))
            left.copy_(normalised(torch.einsum("noi,ni->no", weights, right)))
    # What autograd keeps is the product: the vectors may change before a backward pass.
    return (weights * (left.unsqueeze(2) * right.unsqueeze(1))).sum()


def of_one_shape(matrices: Sequence[Tensor]) -> list[list[int]]:
    """The places of matrices of each shape, which are worked on together."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault(tuple(matrix.shape), []).append(place)
    return list(places.values())


def normalised(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1, eps=1e-3)
