"""What a prior is asked to draw: a class, a picture that goes with codes which are there already, or nothing in
particular."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from stage1_vq.codes import Codes, Grid
from training.errors import UserError


@dataclass(frozen=True)
class Condition:
    """The condition of a batch. A prior of `num_classes` classes also has a null label, `num_classes`: any class."""

    labels: Tensor | None = None  # b, int64 in [0, num_classes]; None for a prior without classes
    codes: Codes | None = None  # one int64 b h w for each grid that the prior is given: coarser levels, or other codes

    def to(self, device: torch.device) -> Self:
        return type(self)(
            None if self.labels is None else self.labels.to(device),
            None if self.codes is None else tuple(grid.to(device) for grid in self.codes),
        )

    def doubled_for_guidance(self, num_classes: int) -> Self:
        """The condition of 2b samples: this one, then the null label for each of its samples. Given codes stay as they
        are, guidance follows the label. Raises UserError when there is no label to guide to."""
        if self.labels is None:
            raise UserError("got guidance for a prior without classes, expected guidance=1: it has no label to follow")
        return type(self)(
            torch.cat([self.labels, torch.full_like(self.labels, num_classes)]),
            None if self.codes is None else tuple(grid.repeat(2, 1, 1) for grid in self.codes),
        )

    def check(self, batch: int, num_classes: int, given: Sequence[Grid] = ()) -> None:
        """Raises UserError unless labels are given exactly if the prior has classes, and codes of exactly the grids
        `given`, one for each sample."""
        if num_classes == 0:
            if self.labels is not None:
                raise UserError("got labels for a prior without classes, expected none; leave the labels out")
        elif self.labels is None:
            raise UserError(
                f"got no labels for a prior of {num_classes} classes; give each sample a label from 0 to "
                f"{num_classes - 1}, or {num_classes} for any class"
            )
        elif tuple(self.labels.shape) != (batch,):
            raise UserError(f"got labels of shape {tuple(self.labels.shape)}, expected ({batch},): one for each sample")
        shapes = [tuple(grid.shape) for grid in self.codes or ()]
        expected = [(batch, grid.height, grid.width) for grid in given]
        if shapes != expected:
            raise UserError(f"got given codes of shapes {shapes}, expected {expected}: those that the prior goes by")

    def check_range(self, num_classes: int) -> None:
        """Raises UserError when a label is no class and not the null label. Waits for the device, unlike `check`."""
        if self.labels is None or self.labels.numel() == 0:
            return
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest > num_classes:
            raise UserError(
                f"got label {lowest if lowest < 0 else highest}, expected 0 to {num_classes - 1}, or {num_classes} "
                "for any class"
            )
