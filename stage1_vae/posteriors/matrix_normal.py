"""Matrix-variate normal posterior of feature maps: Wang, Yuan and Ji 2017, "Spatial Variational Auto-Encoding via
Matrix-Variate Normal Distributions" (arXiv:1705.06821).

Each map of an image's latents, h w, is

    Z = M + Omega^(1/2) E Psi^(1/2),   E of independent standard normal numbers

with diagonal Omega, h h, and Psi, w w: the covariance of vec(Z) is the Kronecker product of Psi and Omega, and so each
number's variance is omega_i psi_j. What an encoder must say of a map are

    2 h w            numbers for independent Gaussians
    h w + h + w      of full rank: M any matrix
    2 (h + w)        of low rank: M = mu nu^T, mu of h numbers and nu of w

so that rows and columns are told, and not single places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.errors import check_fields
from stage1_vae.posteriors.base import LatentShape, PosteriorLayer
from stage1_vae.posteriors.diagonal import DiagonalGaussian


@dataclass(frozen=True, kw_only=True)
class MatrixNormalConfig:
    """q(z|x) of `model.latents` maps of height x width, each a matrix-variate normal with diagonal covariances. The
    encoder's network gives one vector, whatever the maps' size."""

    kind: Literal["matrix_normal"] = "matrix_normal"
    height: int = 4  # h of each map
    width: int = 4  # w of each map
    rank: Literal["full", "low"] = "low"  # of means: any matrix, or mu nu^T

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("height", self.height >= 1, "at least 1"),
                ("width", self.width >= 1, "at least 1"),
                ("rank", self.rank in ("full", "low"), "full or low"),
            ],
        )

    @property
    def numbers(self) -> int:
        """That the encoder says of a map."""
        mean = self.height + self.width if self.rank == "low" else self.height * self.width
        return mean + self.height + self.width


class MatrixNormalLayer(PosteriorLayer):
    """`b features` -> the posterior of c maps of h w: of independent numbers, whose means and scales are products."""

    config: MatrixNormalConfig

    def __init__(self, config: MatrixNormalConfig, shape: LatentShape) -> None:
        super().__init__(config, shape)
        self.features = shape[0] * config.numbers

    def forward(self, features: Tensor) -> DiagonalGaussian:
        height, width = self.config.height, self.config.width
        told = features.float().unflatten(1, (self.shape[0], -1))  # b c numbers
        *means, rows, columns = told.split([*self.parts_of_means, height, width], dim=-1)
        if self.config.rank == "low":
            mean = torch.einsum("bci,bcj->bcij", *means)
        else:
            mean = means[0].unflatten(-1, (height, width))
        log_scale = 0.5 * (rows.unsqueeze(-1) + columns.unsqueeze(-2))  # rows: log omega; columns: log psi
        return DiagonalGaussian(mean, log_scale)

    @property
    def parts_of_means(self) -> list[int]:
        height, width = self.config.height, self.config.width
        return [height, width] if self.config.rank == "low" else [height * width]
