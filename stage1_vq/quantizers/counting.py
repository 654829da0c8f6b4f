"""What quantizers with one grid, whose codebook learns by gradient or is fixed, have in common."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from codes.spec import Grid
from stage1_vq.quantizers.base import Quantizer
from stage1_vq.quantizers.usage import CodeUsage


class CountingQuantizer(Quantizer):
    """Nothing of it changes between steps but the count of its codes: in training mode, its `forward` calls
    `self.usage.note(codes)`."""

    remedies: ClassVar[tuple[str, ...]]  # what a person may try when few codes are in use; {path} is that of the config

    def __init__(self, dim: int, codebook_size: int, warn_below: float, dim_out: int | None = None) -> None:
        """codebook_size: k; warn_below: the share of codes used in an epoch below which the log warns."""
        super().__init__(dim, dim_out)
        self.usage = CodeUsage(codebook_size, warn_below)

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        return (Grid("codes", height, width, self.usage.codebook_size),)

    def update(self) -> None:
        self.usage.step()

    def health(self, steps_per_epoch: int) -> dict[str, Tensor]:
        return self.usage.health(steps_per_epoch)

    def discard(self) -> None:
        self.usage.discard()

    def warnings(self, metrics: dict[str, float], steps_per_epoch: int) -> list[str]:
        remedies = [remedy.format(path=self.path) for remedy in self.remedies]
        return self.usage.warnings(metrics, steps_per_epoch, remedies)
