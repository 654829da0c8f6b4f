"""How much of the made images looks real, and how much of the real ones is made.

Precision and recall by balls around each image (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage
(Naeem et al. 2020, arXiv:2002.09797). Each is a comparison of a distance with another one, so distances are exact
enough to tell copies: the products are float64 of features moved to the middle, and what rounding leaves of 0 is 0.
(torch.cdist changes its algorithm with the number of rows, and in float32 finds copies 0.18 apart where features lie
at 100.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from metrics.statistics import check_finite, in_float64

ROWS = 512  # whose distances to all others are in memory at a time: 40 MB for 10,000 others
NOTHING = 1e-12  # of the squared lengths of two vectors: a squared distance that is rounding alone


class PrecisionRecall(NamedTuple):
    precision: float  # share of made images that lie in the ball of a real one
    recall: float  # share of real images that lie in the ball of a made one


class DensityCoverage(NamedTuple):
    density: float  # in how many real balls a made image lies, over k; may be above 1
    coverage: float  # share of real images with a made one in their ball


class Manifolds(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> PrecisionRecall:
    """real, made: features n d and m d; the ball of an image reaches to its k-th nearest other one of the same set,
    which belongs to it. k is 3 in the paper, whose sets have 50,000 images each: with fewer, balls are wider and both
    figures higher. Raises UserError."""
    found = manifolds(real, made, k, k)
    return PrecisionRecall(found.precision, found.recall)


def density_coverage(real: Tensor, made: Tensor, k: int = 5) -> DensityCoverage:
    """real, made: features n d and m d; k: as in `precision_recall`, 5 in the paper. For two equal distributions
    density is 1, and coverage 1 - 2**-k for many images of each. Raises UserError."""
    found = manifolds(real, made, k, k)
    return DensityCoverage(found.density, found.coverage)


def manifolds(real: Tensor, made: Tensor, k: int = 3, k_density: int = 5) -> Manifolds:
    """All four from one pass over the distances. k: of precision and recall, k_density: of density and coverage. Raises
    UserError for sets that have no k-th neighbours, and for features of different networks."""
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise UserError(
            f"features of shapes {tuple(real.shape)} and {tuple(made.shape)}, expected (n, d) and (m, d) of one network"
        )
    if min(k, k_density) < 1 or len(real) <= max(k, k_density) or len(made) <= k:
        raise UserError(
            f"neighbours {k} and {k_density} of {len(real)} real and {len(made)} made images, expected at least 1, and "
            "more images than neighbours; give more images"
        )
    check_finite(real, made)
    middle = in_float64(real).mean(dim=0)
    x, y = in_float64(real) - middle, in_float64(made) - middle
    radius_real, radius_density = neighbours(x, (k, k_density))
    (radius_made,) = neighbours(y, (k,))
    balls_of_real, balls_of_density = torch.zeros(len(y)).to(y), torch.zeros(len(y)).to(y)
    recalled, covered = 0, 0
    for start in range(0, len(x), ROWS):
        distances = squared_distances(x[start : start + ROWS], y)  # rows m
        reach, wide = radius_real[start : start + ROWS, None], radius_density[start : start + ROWS, None]
        balls_of_real += (distances <= reach).sum(dim=0)
        balls_of_density += (inside := distances <= wide).sum(dim=0)
        covered += int(inside.any(dim=1).sum())
        recalled += int((distances <= radius_made).any(dim=1).sum())
    return Manifolds(
        precision=float((balls_of_real > 0).double().mean()),
        recall=recalled / len(x),
        density=float(balls_of_density.sum()) / (k_density * len(y)),
        coverage=covered / len(x),
    )


def neighbours(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """For each k the squared distance of every row, n, to its k-th nearest other row. x: n d, float64."""
    nearest = []
    for start in range(0, len(x), ROWS):
        distances = squared_distances(x[start : start + ROWS], x)
        distances[torch.arange(len(distances)), torch.arange(start, start + len(distances))] = torch.inf
        nearest.append(distances.topk(max(ks), largest=False).values)  # rows k
    # Wider by the rounding of a distance, so that a copy of the neighbour lies in the ball as the neighbour does.
    reach = torch.cat(nearest)
    reach += 2 * NOTHING * (reach + x.square().sum(dim=1, keepdim=True))
    return [reach[:, k - 1] for k in ks]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """n d, m d -> n m, float64; of equal vectors 0."""
    lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = torch.addmm(lengths, x, y.T, alpha=-2)
    return distances.masked_fill_(distances < NOTHING * lengths, 0.0)
